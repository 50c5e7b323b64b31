"""The lifespan of a file of nodes: opened before its nodes work, and closed after them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.logs import capture_logs

from loom.runner.cli import file_lifespan as module
from loom.runner.cli.file_lifespan import InvalidLifespan, entered, lifespan_of
from loom.runner.cli.input_files import InvalidFile, load_node_file

FILE = Path("agents.py")


async def seen(make: Callable[[list[str]], Any]) -> list[str]:
    """Return the events around a body, in order."""
    steps: list[str] = []
    async with entered(lifespan_of(make(steps)), FILE):
        steps.append("body")
    return steps


def generator(steps: list[str]) -> Any:
    async def lifespan() -> AsyncIterator[None]:
        steps.append("entered")
        yield
        steps.append("left")

    return lifespan


def manager(steps: list[str]) -> Any:
    return asynccontextmanager(generator(steps))


@pytest.mark.parametrize("make", [generator, manager])
async def test_a_lifespan_surrounds_the_body(make: Callable[[list[str]], Any]) -> None:
    assert await seen(make) == ["entered", "body", "left"]


async def test_a_file_without_a_lifespan_runs() -> None:
    async with entered(None, FILE):
        pass


async def test_it_is_left_when_the_body_is_cancelled() -> None:
    steps: list[str] = []
    begun = asyncio.Event()

    async def body() -> None:
        async with entered(lifespan_of(generator(steps)), FILE):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await begun.wait()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert steps == ["entered", "left"]


async def coroutine() -> None:
    pass


async def with_argument(app: Any) -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize("given", [7, coroutine, with_argument, dict])
def test_an_invalid_lifespan_is_refused(given: Any) -> None:
    with pytest.raises(InvalidLifespan, match="lifespan must be an async generator function"):
        lifespan_of(given)


async def raises() -> AsyncIterator[None]:
    raise OSError("no database")
    yield


async def exits() -> AsyncIterator[None]:
    raise SystemExit(3)
    yield


async def hangs() -> AsyncIterator[None]:
    await asyncio.Event().wait()
    yield


async def never_yields() -> AsyncIterator[None]:
    for _ in ():
        yield


def not_a_manager() -> int:
    return 7


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (raises, "agents.py: lifespan did not begin: OSError: no database"),
        (exits, "agents.py: lifespan did not begin: SystemExit: 3"),
        (hangs, "agents.py: lifespan did not begin: TimeoutError"),
        (never_yields, "agents.py: lifespan did not begin: RuntimeError"),
        (not_a_manager, "agents.py: lifespan must be an async generator function"),
    ],
)
async def test_a_failure_to_start_is_one_sentence(given: Any, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENTER_S", 0.05)
    with pytest.raises(InvalidLifespan) as caught:
        async with entered(lifespan_of(given), FILE):
            pytest.fail("the body runs")
    assert caught.value.message.startswith(sentence)
    assert "\n" not in caught.value.message


async def leaves_badly() -> AsyncIterator[None]:
    yield
    raise OSError("gone")


async def never_leaves() -> AsyncIterator[None]:
    yield
    await asyncio.Event().wait()


@pytest.mark.parametrize(("given", "reason"), [(leaves_badly, "OSError: gone"), (never_leaves, "TimeoutError")])
async def test_a_failure_to_end_is_logged(given: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAVE_S", 0.05)
    with capture_logs() as logs:
        async with entered(lifespan_of(given), FILE):
            pass
    (line,) = [line for line in logs if line["event"] == "lifespan_failed"]
    assert line["reason"].startswith(f"agents.py: lifespan did not end: {reason}")


NODES = """
from loom.types import AgentNode
nodes = [AgentNode(id="n1", agent=lambda text: text)]
"""


def test_a_file_defines_its_lifespan_next_to_its_nodes(tmp_path: Path) -> None:
    script = tmp_path / "agents.py"
    script.write_text(f"{NODES}\nasync def lifespan():\n    yield\n")
    loaded = load_node_file(script)

    assert loaded.lifespan is not None
    assert loaded.close_s == module.LEAVE_S
    script.write_text(NODES)
    assert load_node_file(script).lifespan is None


def test_a_file_with_another_thing_of_that_name_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "agents.py"
    script.write_text(f"{NODES}\nlifespan = 5\n")
    with pytest.raises(InvalidFile, match=r"agents\.py: lifespan must be an async generator"):
        load_node_file(script)
