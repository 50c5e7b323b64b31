"""How the events of a run become messages, and how much code a run passes."""

import asyncio
import sys
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any, cast

import pytest
from support.prose import ROOT

from loom.agents import user_code
from loom.agents.function_agent import FunctionAgent
from loom.agents.host.runs import Run
from loom.agents.protocol import collect
from loom.bus.bus import Bus
from loom.schemas.events import TextDelta
from loom.schemas.run import RunEvent, RunRequest, read_events
from loom.schemas.task import RunResult

JOB = RunRequest(task_id="t1", description="count to 3", remaining_s=10)
MAX_CALLS = 95
"""Python calls in this project's code for one run of a function agent; 85 when this was written."""


class Published:
    """A connection that keeps what is published, each message as its events."""

    closing = False

    def __init__(self) -> None:
        self.messages: list[list[str]] = []

    def publish_nowait(self, _subject: str, body: bytes) -> None:
        self.messages.append([event.kind for event in read_events(body)])


@pytest.fixture
def published() -> Published:
    return Published()


@pytest.fixture
def run(published: Published) -> Run:
    return Run(cast("Bus", SimpleNamespace(connection=published)), JOB, "events")


@pytest.fixture
def scheduled(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., Any]]:
    """The callbacks that runs schedule."""
    callbacks: list[Callable[..., Any]] = []
    loop_of = asyncio.get_running_loop

    def counting() -> Any:
        loop = loop_of()

        def call_soon(callback: Callable[[], None]) -> None:
            callbacks.append(callback)
            loop.call_soon(callback)

        return SimpleNamespace(call_soon=call_soon)

    counted = SimpleNamespace(get_running_loop=counting, Event=asyncio.Event)
    monkeypatch.setattr("loom.agents.host.runs.asyncio", counted)
    return callbacks


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_run_that_ends_within_a_turn_makes_two_messages_and_schedules_one_callback(
    run: Run, published: Published, scheduled: list[Callable[..., Any]]
) -> None:
    run.emit("accepted", at_once=True)
    assert published.messages == [["accepted"]]
    assert not scheduled
    run.emit("started")
    run.emit("delta", event=TextDelta(text="x"))
    run.emit("result", result=RunResult(content="x"))
    assert published.messages == [["accepted"], ["started", "delta", "result"]]
    await turns(4)
    assert len(scheduled) == 1
    assert len(published.messages) == 2


async def test_events_of_this_and_the_next_turn_are_one_message(run: Run, published: Published) -> None:
    run.emit("accepted")
    run.emit("started")
    await turns(1)
    run.emit("delta", event=TextDelta(text="x"))
    assert not published.messages
    await turns(2)
    assert published.messages == [["accepted", "started", "delta"]]
    run.emit("delta", event=TextDelta(text="y"))
    await turns(3)
    assert published.messages[1:] == [["delta"]]


async def test_a_run_sends_all_events_before_one_that_is_sent_at_once(run: Run, published: Published) -> None:
    run.emit("accepted")
    run.emit("started", at_once=True)
    await turns(3)
    assert published.messages == [["accepted", "started"]]


async def test_a_run_of_a_function_agent_passes_a_bounded_number_of_calls() -> None:
    async def echo(text: str) -> str:
        return text

    events: list[RunEvent] = []

    async def keep(event: Any) -> None:
        events.append(event)

    agent = FunctionAgent(echo)
    await collect(agent, JOB, keep)
    calls: list[str] = []

    def count(frame: FrameType, event: str, _argument: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(ROOT)) and ".venv" not in path:
            calls.append(frame.f_code.co_name)

    sys.setprofile(count)
    try:
        await collect(agent, JOB, keep)
    finally:
        sys.setprofile(None)
    assert len(events) == 6
    assert 20 < len(calls) <= MAX_CALLS, sorted(calls)


async def test_whether_a_function_is_async_is_determined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    determined: list[object] = []
    is_async = user_code.is_async

    def counted(fn: Callable[..., Any]) -> bool:
        determined.append(fn)
        return is_async(fn)

    monkeypatch.setattr(user_code, "is_async", counted)
    agent = FunctionAgent(str.upper)
    for _ in range(3):
        assert (await collect(agent, JOB)).content == "COUNT TO 3"
    assert determined == [str.upper]
