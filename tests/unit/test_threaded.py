"""Sync generators, iterated in a thread next to the event loop."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import pytest
from support.wait import until

from loom.agents.function_agent import FunctionAgent
from loom.agents.protocol import collect
from loom.agents.threaded import AHEAD, ThreadedIteration
from loom.schemas.errors import AgentFailed, DeadlineExceeded
from loom.schemas.events import TextDelta
from loom.schemas.run import RunRequest

JOB = RunRequest(task_id="t1", description="count to 3", remaining_s=10)


async def test_the_loop_continues_while_a_generator_blocks_and_pieces_arrive_at_once() -> None:
    go_on = threading.Event()

    def slow(text: str) -> Iterator[str]:
        yield text
        assert go_on.wait(5)
        yield "!"

    texts = []
    async with aclosing(FunctionAgent(slow).stream(JOB)) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                texts.append(event.text)
                go_on.set()
    assert texts == ["count to 3", "!"]


async def test_a_generator_sees_the_context_variables_of_its_run() -> None:
    tenant: ContextVar[str] = ContextVar("tenant")
    tenant.set("acme")

    def pieces(text: str) -> Iterator[str]:
        yield text
        yield f" for {tenant.get()}"

    assert (await collect(FunctionAgent(pieces), JOB)).content == "count to 3 for acme"


def fails(error: BaseException) -> Callable[[str], Iterator[str]]:
    def pieces(text: str) -> Iterator[str]:
        yield text
        raise error

    return pieces


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        KeyboardInterrupt(),
        SystemExit(1),
        StopIteration(),
        StopAsyncIteration(),
        GeneratorExit(),
        asyncio.CancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_exception_of_a_generator_is_a_failure_with_its_type(error: BaseException) -> None:
    with pytest.raises(AgentFailed) as caught:
        await collect(FunctionAgent(fails(error)), JOB)
    assert caught.value.message == f"the agent raised {type(error).__name__}"


async def test_a_generator_without_end_is_stopped_and_closed() -> None:
    closed = threading.Event()

    def endless(text: str) -> Iterator[str]:
        try:
            while True:
                yield text * 1000
        finally:
            closed.set()

    with pytest.raises(AgentFailed, match="endless output"):
        await collect(FunctionAgent(endless), JOB)
    await until(closed.is_set, what="the generator is closed")


async def test_the_deadline_ends_a_generator_that_hangs() -> None:
    def hangs(text: str) -> Iterator[str]:
        yield text
        threading.Event().wait(30)

    with pytest.raises(DeadlineExceeded):
        await collect(FunctionAgent(hangs), RunRequest(task_id="t1", description="x", remaining_s=0.05))


async def test_a_generator_is_only_a_little_ahead_of_its_reader() -> None:
    made: list[int] = []

    def numbers() -> Iterator[Any]:
        for number in range(10 * AHEAD):
            made.append(number)
            yield number

    items = ThreadedIteration(numbers())  # type: ignore[arg-type]
    assert await anext(items) == 0
    await until(lambda: len(made) > AHEAD, what="as many as it may be ahead")
    await asyncio.sleep(0)
    assert len(made) <= AHEAD + 3
    assert [await anext(items) async for _ in _times(5)] == [1, 2, 3, 4, 5]
    await items.aclose()


async def _times(count: int) -> Any:
    for number in range(count):
        yield number
