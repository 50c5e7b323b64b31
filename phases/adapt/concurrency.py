"""Writes to the server that do not wait for each other."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

CONCURRENT = 64
"""Writes that wait for their acknowledgements at a time."""


async def for_each(items: Iterable[T], write: Callable[[T], Awaitable[None]]) -> None:
    """Call `write` for each item, up to 64 at a time.

    Raises:
        Exception: The first error of a write, after the others of its time have ended; later items are left out.
    """
    rest = iter(items)
    while chunk := list(islice(rest, CONCURRENT)):
        results = await asyncio.gather(*map(write, chunk), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
