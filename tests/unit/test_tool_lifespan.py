"""Resources of tools: opened once, closed by the opening task, and reopened after a failure."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support.logs import capture_logs
from support.wait import until

from loom.agents.llm.agent import Agent
from loom.agents.tools import Lifespan, Tool, ToolContext, close_all, start_all
from loom.schemas.errors import LoomError

CONTEXT = ToolContext(task_id="t1", attempt=1, remaining_s=10)


class Server:
    """Counts openings and closings; if `fault` is set, opening or closing raises it."""

    def __init__(self) -> None:
        self.opened: list[asyncio.Task[Any] | None] = []
        self.closed: list[asyncio.Task[Any] | None] = []
        self.breaking = asyncio.Event()
        self.fault: BaseException | None = None
        self.close_fault: BaseException | None = None

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[int]:
        if self.fault:
            raise self.fault
        self.opened.append(asyncio.current_task())
        try:
            yield len(self.opened)
        finally:
            self.closed.append(asyncio.current_task())
        if self.close_fault:
            raise self.close_fault

    def life(self) -> Lifespan[int]:
        return Lifespan(self.connect, name="the server")


def using(life: Lifespan[int], name: str = "use") -> Tool:
    return Tool(name=name, schema={}, call=lambda _arguments, _context: life.value, lifespan=life)


async def test_one_opening_serves_all_tools_and_closes_in_its_own_task() -> None:
    server = Server()
    life = server.life()
    tools = [using(life, "a"), using(life, "b")]

    await asyncio.gather(*(asyncio.create_task(each.start()) for each in tools))
    assert [(await each.run("{}", CONTEXT)).text for each in tools] == ["1", "1"]
    await asyncio.create_task(tools[0].close())
    assert not server.closed
    await asyncio.create_task(tools[1].close())

    assert server.opened == server.closed
    assert len(server.opened) == 1


async def test_it_can_be_opened_again() -> None:
    server = Server()
    made = using(server.life())
    for n in (1, 2):
        await made.start()
        assert (await made.run("{}", CONTEXT)).text == str(n)
        await made.close()
    await made.close()  # once too often

    assert len(server.closed) == 2


async def test_one_that_broke_is_opened_again_by_the_next_call() -> None:
    breaking = asyncio.Event()
    opened = 0

    @asynccontextmanager
    async def connect() -> AsyncIterator[int]:
        nonlocal opened
        opened += 1
        task = asyncio.current_task()
        assert task is not None
        watch = asyncio.create_task(_cancel_when(breaking, task))
        try:
            yield opened
        finally:
            watch.cancel()

    life = Lifespan(connect)
    made = using(life)
    await made.start()
    breaking.set()
    await until(lambda: life._task is not None and life._task.done(), what="the end of the server")
    breaking.clear()

    assert (await made.run("{}", CONTEXT)).text == "2"
    await made.close()


async def _cancel_when(event: asyncio.Event, task: "asyncio.Task[Any]") -> None:
    await event.wait()
    task.cancel()


@pytest.mark.parametrize("threaded", [False, True])
async def test_a_call_that_finds_a_lost_resource_reopens_it_for_the_next_call(threaded: bool) -> None:
    server = Server()
    life = server.life()
    life.reopen()  # nothing is open

    def use(_arguments: dict[str, Any], _context: ToolContext) -> int:
        if life.value == 1:
            life.reopen()
            raise ConnectionError("lost")
        return life.value

    async def use_in_loop(arguments: dict[str, Any], context: ToolContext) -> int:
        return use(arguments, context)

    made = Tool(name="use", schema={}, call=use if threaded else use_in_loop, lifespan=life)
    await made.start()
    with capture_logs():
        assert (await made.run("{}", CONTEXT)).failed
    assert (await made.run("{}", CONTEXT)).text == "2"
    await made.close()

    assert server.closed == server.opened
    assert len(server.opened) == 2


@pytest.mark.parametrize("fault", [OSError("refused: key 1234"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
async def test_one_that_cannot_be_opened_is_an_error_without_its_text(fault: BaseException) -> None:
    server = Server()
    server.fault = fault
    made = using(server.life())

    with capture_logs() as logs, pytest.raises(LoomError, match="the server cannot be opened") as caught:
        await made.start()

    assert "1234" not in str(caught.value)
    assert [line["event"] for line in logs] == ["tool_resource_failed"]
    assert "not open" in (await made.run("{}", CONTEXT)).text


async def test_an_agent_that_cannot_start_all_tools_closes_those_it_started() -> None:
    fine, broken = Server(), Server()
    broken.fault = OSError("refused")
    agent = Agent(None, tools=[using(fine.life(), "a"), using(broken.life(), "b")])  # type: ignore[arg-type]

    with capture_logs(), pytest.raises(LoomError):
        await agent.start()

    assert len(fine.closed) == 1


async def test_an_error_on_closing_is_logged_and_other_resources_are_closed() -> None:
    bad, fine = Server(), Server()
    bad.close_fault = OSError("gone")
    tools = [using(bad.life(), "a"), using(fine.life(), "b")]

    await start_all(tools)
    with capture_logs() as logs:
        await close_all(tools)

    assert len(fine.closed) == 1
    assert [line["event"] for line in logs] == ["tool_resource_failed"]


async def test_a_start_that_is_cancelled_leaves_nothing_behind() -> None:
    entered, left = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def slow() -> AsyncIterator[None]:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()
        yield

    made = Tool(name="use", schema={}, call=lambda _arguments, _context: "", lifespan=Lifespan(slow))
    starting = asyncio.create_task(made.start())
    await entered.wait()
    starting.cancel()
    await asyncio.wait({starting})

    assert starting.cancelled()
    assert left.is_set()


async def test_closing_takes_no_longer_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loom.agents.tools.lifespan.CLOSE_S", 0.02)
    release = asyncio.Event()

    @asynccontextmanager
    async def stubborn() -> AsyncIterator[None]:
        yield
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    life = Lifespan(stubborn)
    await life.start()
    with capture_logs() as logs:
        await life.close()
    release.set()

    assert [line["event"] for line in logs] == ["tool_resource_left_open"]
