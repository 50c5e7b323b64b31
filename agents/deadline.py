"""The moment after which a job's work is worthless."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar, cast

from loom.schemas.errors import DeadlineExceeded

T = TypeVar("T")

_END = object()


class Deadline:
    """A deadline `seconds` from now, on the running loop's clock; what waits under it raises DeadlineExceeded."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at = asyncio.get_running_loop().time() + seconds

    @property
    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._at - asyncio.get_running_loop().time())

    def check(self) -> None:
        """Raise DeadlineExceeded if no time is left."""
        if not self.left:
            raise self._exceeded()

    @asynccontextmanager
    async def enforced(self) -> AsyncIterator[None]:
        """Cancel the body when time runs out."""
        self.check()
        try:
            async with asyncio.timeout_at(self._at) as scope:
                yield
        except TimeoutError as error:
            if scope.expired():
                raise self._exceeded() from error
            raise

    async def each(self, source: AsyncIterable[T]) -> AsyncGenerator[T, None]:
        """Yield what `source` yields, in time, and close it however this ends."""
        items = aiter(source)
        try:
            while True:
                async with self.enforced():
                    item = await anext(items, _END)
                if item is _END:
                    return
                yield cast("T", item)
        finally:
            close = getattr(items, "aclose", None)
            if close is not None:
                await close()

    def _exceeded(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"not done within {self._seconds:g} s")
