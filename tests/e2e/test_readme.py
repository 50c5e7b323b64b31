"""What the README shows is what happens."""

import asyncio
import json
import os
import re
import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from support.openai_server import OpenAIServer
from support.words import accepted

from loom.bus import tasks
from loom.bus.client import Bus
from loom.schemas.auction import HostAnnouncement
from loom.schemas.task import TaskResult
from loom.schemas.wire import decode

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOOM = [sys.executable, "-m", "loom.runner.cli"]

PROGRAMS = re.findall(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```)?", README, flags=re.MULTILINE | re.DOTALL)
SHELL = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
COMMANDS = [shlex.split(line, comments=True) for line in SHELL]


async def output_of(command: list[str], **environment: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**{key: value for key, value in os.environ.items() if key != "NATS_URL"}, **environment},
    )
    async with asyncio.timeout(40):
        out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return out.decode()


@asynccontextmanager
async def service(command: list[str], **environment: str) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        *LOOM, *command[1:], cwd=ROOT, env={**os.environ, **environment}, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        async with asyncio.timeout(15):
            assert await process.wait() == 0


@pytest.mark.parametrize(("program", "printed"), PROGRAMS, ids=[f"program {n + 1}" for n in range(len(PROGRAMS))])
async def test_each_program_prints_what_the_readme_says(program: str, printed: str) -> None:
    with OpenAIServer() as model:
        out = await output_of([sys.executable, "-c", program], OPENAI_BASE_URL=model.base_url, OPENAI_API_KEY="test")

    assert out == printed if printed else "to be or not to be" in out


async def test_the_cluster_of_the_readme_does_the_task_of_the_readme(on_bus: tuple[str, str], client: Bus) -> None:
    """`loom up`, `loom node` and the two ways to submit, word for word."""
    up = next(command for command in COMMANDS if command[:2] == ["loom", "up"])
    [nodes] = [command for command in COMMANDS if command[:2] == ["loom", "node"]]
    [submit] = [command for command in COMMANDS if command[:2] == ["loom", "submit"]]
    [request] = [command for command in COMMANDS if command[:2] == ["nats", "req"]]
    announced = asyncio.Event()

    async def hear(msg: object) -> None:
        if decode(msg.data, HostAnnouncement).nodes:  # type: ignore[attr-defined]
            announced.set()

    await client.subscribe(client.subjects.of("host", "*"), hear)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(service(up))
        await stack.enter_async_context(service(nodes))
        async with asyncio.timeout(20):
            await announced.wait()
        printed = await output_of([*LOOM, *submit[1:]], NATS_URL=on_bus[0])
        subject, ad = request[-2:]
        answer = await tasks.ask(client, subject.replace("loom.", f"{on_bus[1]}."), ad.encode(), timeout_s=30)

    assert "revenue" in printed or "rows" in printed
    result = decode(answer, TaskResult)
    assert result.state == "succeeded"
    assert json.loads(ad)["domain"] == result.domain == "data"


async def test_the_report_of_the_readme_is_written(tmp_path: Path) -> None:
    """From real files, by a plan in the ad, on a server of its own."""
    [run] = [command for command in COMMANDS if command[:2] == ["loom", "run"]]
    out = tmp_path / "results.jsonl"
    told = await output_of([*LOOM, *run[1:], "--out", str(out)])

    [result] = [decode(line, TaskResult) for line in out.read_bytes().splitlines()]
    assert result.success
    assert not result.below_threshold
    assert result.node_id == "editor"
    assert "loans per visitor: Hill Library 2.47" in result.content
    assert "begun subtasks done" in told


@pytest.mark.parametrize(
    "words", [command for command in COMMANDS if command[0] == "loom"], ids=lambda words: " ".join(words[:2])
)
def test_every_command_is_one_the_command_line_knows(words: list[str]) -> None:
    assert accepted(words[1:]) == words[1]


@pytest.mark.parametrize("target", [command[1] for command in COMMANDS if command[0] == "make"])
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)

    assert [link for link in links if not (ROOT / link).exists()] == []
