"""The nodes of examples/wire use NATS and JSON without loom: they win tasks, work, and obey stops."""

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from support.javascript import javascript_folder
from support.runs import event_subject
from support.wait import until

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.schemas.events import TextDelta
from loom.schemas.run import RunEvent, RunRequest, Stop, read_events
from loom.schemas.task import TaskAd

EXAMPLES = Path(__file__).parents[2] / "examples" / "wire"
NAMES = ("node", "plain_node")
Start = Callable[[str], AbstractAsyncContextManager[str]]


@pytest.fixture(scope="session")
def javascript() -> Path:
    """A folder with the JavaScript examples and the one package they need."""
    folder = javascript_folder()
    for name in NAMES:
        shutil.copy(EXAMPLES / f"{name}.mjs", folder)
    return folder


@pytest.fixture(params=["py", pytest.param("mjs", marks=pytest.mark.slow)])
def start(request: pytest.FixtureRequest, client: Bus) -> Start:
    """A function that starts an example by name, and yields its host id after the announcement."""
    folder = EXAMPLES if request.param == "py" else request.getfixturevalue("javascript")
    interpreter = sys.executable if request.param == "py" else "node"

    @asynccontextmanager
    async def run(name: str) -> AsyncIterator[str]:
        hosts: list[Msg] = []
        await client.connection.subscribe_sync(client.subjects.of("host", "local", "*"), hosts.append)
        process = await asyncio.create_subprocess_exec(interpreter, str(folder / f"{name}.{request.param}"))
        try:
            await until(lambda: hosts, what="it announces itself")
            yield hosts[0].subject.rpartition(".")[2]
        finally:
            process.kill()
            await process.wait()

    return run


@pytest.mark.parametrize("suffix", ["py", "mjs"])
@pytest.mark.parametrize("name", NAMES)
def test_an_example_node_has_fewer_than_40_lines(name: str, suffix: str) -> None:
    assert len((EXAMPLES / f"{name}.{suffix}").read_text(encoding="utf-8").splitlines()) < 40


@pytest.mark.usefixtures("phases")
async def test_a_full_node_wins_a_task_and_shows_its_progress(client: Bus, start: Start) -> None:
    async with start("node"):
        handle = await task_client.publish(client, TaskAd(domain="shout", description="hello wire", timeout_s=30))
        deltas = [delta async for delta in handle.events()]
        result = await handle.result(20)
    assert (result.state, result.content, result.node_id, result.attempts) == ("succeeded", "HELLO WIRE", "shouter", 1)
    assert [delta.event.text for delta in deltas if isinstance(delta.event, TextDelta)] == ["HELLO ", "WIRE "]


@pytest.mark.usefixtures("phases")
async def test_a_full_node_stops_the_run_of_a_cancelled_task(client: Bus, start: Start) -> None:
    async with start("node") as host_id:
        events: list[RunEvent] = []
        subject = client.subjects.of("event", "local", host_id, "*", "*")
        await client.connection.subscribe_sync(subject, lambda msg: events.extend(read_events(msg.data)))
        ad = TaskAd(domain="shout", description="again and " * 2000, timeout_s=60)
        handle = await task_client.publish(client, ad, deltas=False)
        await until(lambda: any(event.kind == "delta" for event in events), what="it works")
        assert (await handle.cancel()).state == "cancelled"
        await until(lambda: events[-1].kind == "error", what="it has stopped")
        assert (await handle.result(20)).state == "cancelled"
    assert events[-1].error is not None
    assert events[-1].error.code == "cancelled"


async def test_the_run_of_a_full_node_moves_to_the_execute_that_asks_last(client: Bus, start: Start) -> None:
    async with start("node") as host_id:
        received: list[list[RunEvent]] = [[], []]

        async def ask(number: int, **facts: int) -> None:
            def append_events(msg: Msg) -> None:
                received[number].extend(read_events(msg.data))

            words = "one two " * 500
            request = RunRequest(task_id="t1", node_id="shouter", domain="shout", description=words, **facts)  # type: ignore[arg-type]
            reply = await event_subject(client, host_id, append_events)
            await client.connection.publish(client.subjects.of("run", "local", host_id), request, reply=reply)

        await ask(0)
        await until(lambda: len(received[0]) > 5, what="it works")
        await ask(1, from_seq=4)
        await until(lambda: received[0][-1].kind == "moved" and len(received[1]) > 5, what="it has moved")
        assert [event.seq for event in received[1]] == list(range(4, 4 + len(received[1])))
        stop = Stop(task_id="t1", attempt=1, why="cancelled")
        await client.connection.publish(client.subjects.of("stop", "local", host_id), stop)
        await until(lambda: received[1][-1].kind == "error", what="it has stopped")


@pytest.mark.slow
async def test_a_full_node_shows_that_it_lives_while_it_works(client: Bus, start: Start) -> None:
    async with start("node") as host_id:
        events: list[RunEvent] = []
        reply = await event_subject(client, host_id, lambda msg: events.extend(read_events(msg.data)))
        request = RunRequest(task_id="t1", node_id="shouter", domain="shout", description="on and " * 1000)
        await client.connection.publish(client.subjects.of("run", "local", host_id), request, reply=reply)
        await until(lambda: any(event.kind == "heartbeat" for event in events), what="a heartbeat")


@pytest.mark.usefixtures("phases")
async def test_a_plain_node_wins_a_task_and_its_reply_is_the_answer(client: Bus, start: Start) -> None:
    async with start("plain_node"):
        handle = await task_client.publish(client, TaskAd(domain="whisper", description="HELLO WIRE", timeout_s=30))
        result = await handle.result(20)
    assert (result.state, result.content, result.node_id) == ("succeeded", "hello wire", "whisperer")
