"""Waiting for a condition, with a deadline."""

import asyncio
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import TypeVar, cast

T = TypeVar("T")


async def until(condition: Callable[[], T | Awaitable[T]], *, within_s: float = 20, what: str) -> T:
    """Return the first truthy value of `condition`, asked about every 10 ms.

    Raises:
        AssertionError: `what` did not happen in `within_s` seconds.
    """
    try:
        async with asyncio.timeout(within_s) as deadline:
            while True:
                value = condition()
                if isawaitable(value):
                    value = await value
                if value:
                    return cast("T", value)
                await asyncio.sleep(0.01)
    except TimeoutError:
        if not deadline.expired():
            raise  # the condition's own
    raise AssertionError(f"not within {within_s} s: {what}")
