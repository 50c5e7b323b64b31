"""Coroutines that ignore their cancel."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from loom.agents.abandonable import Abandonable


async def awaited(work: Abandonable[Any]) -> Any:
    return await work


async def test_return_values_and_exceptions_of_the_coroutine_pass_through() -> None:
    async def work(fault: Exception | None) -> str:
        await asyncio.sleep(0)
        if fault is not None:
            raise fault
        return await asyncio.wait_for(asyncio.sleep(0, "done"), 1)

    assert await Abandonable(work(None)) == "done"
    with pytest.raises(ZeroDivisionError):
        await Abandonable(work(ZeroDivisionError()))


async def test_a_cancel_reaches_the_coroutine_which_may_clean_up() -> None:
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    task = asyncio.create_task(awaited(Abandonable(work())))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
    assert cleaned


async def swallows() -> None:
    while True:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()


async def cleans_up_without_end() -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.Event().wait()


async def retries_everything() -> None:
    while True:
        try:
            await asyncio.sleep(0.001)
        except BaseException:  # noqa: BLE001 - what users do
            continue


async def shields() -> None:
    with suppress(asyncio.CancelledError):
        await asyncio.shield(asyncio.sleep(0.01))
    await asyncio.Event().wait()


@pytest.mark.parametrize("deaf", [swallows, cleans_up_without_end, retries_everything, shields])
async def test_an_abandoned_coroutine_is_resumed_no_more(deaf: Callable[[], Coroutine[Any, Any, None]]) -> None:
    work = Abandonable(deaf())
    task = asyncio.create_task(awaited(work))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=0.02)
    assert not task.done()
    work.abandon()
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
    assert not work.cancelled_itself


async def test_a_coroutine_that_cancels_its_own_task_is_recognised() -> None:
    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    abandonable = Abandonable(work())
    task = asyncio.create_task(awaited(abandonable))
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
    assert abandonable.cancelled_itself
