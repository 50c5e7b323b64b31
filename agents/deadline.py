"""The moment after which a job's work is worthless."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable
from types import TracebackType
from typing import TypeVar, cast

from loom.agents.user_code import ClosingIterator
from loom.schemas.errors import DeadlineExceeded

T = TypeVar("T")

_END = object()


class Deadline:
    """A deadline `seconds` from now, on the running loop's clock; what waits under it raises DeadlineExceeded.

    Args:
        early_s: How much earlier it comes, at most a tenth of the time: for work that reports its cost before a
            deadline of its caller ends it.
    """

    def __init__(self, seconds: float, *, early_s: float = 0.0) -> None:
        self._seconds = seconds
        self._now = asyncio.get_running_loop().time
        self._at = self._now() + seconds - min(early_s, seconds / 10)

    @property
    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._at - self._now())

    def check(self) -> None:
        """Raise DeadlineExceeded if no time is left."""
        if self._now() >= self._at:
            raise self.exceeded()

    def enforced(self) -> "Enforced":
        """Cancel the body of an `async with` when time runs out."""
        return Enforced(self, asyncio.timeout_at(self._at))

    async def each(self, source: AsyncIterable[T]) -> AsyncGenerator[T, None]:
        """Yield what `source` yields, in time, and close it however this ends."""
        async with ClosingIterator(source) as items:
            while True:
                async with self.enforced():
                    item = await anext(items, _END)
                if item is _END:
                    return
                yield cast("T", item)

    def exceeded(self) -> DeadlineExceeded:
        """Return the error of whoever was late."""
        return DeadlineExceeded(f"not done within {self._seconds:g} s")


class Enforced:
    """A body that ends with its deadline: a class, since a generator's context costs more than most bodies."""

    def __init__(self, deadline: Deadline, scope: asyncio.Timeout) -> None:
        self._deadline = deadline
        self._scope = scope

    async def __aenter__(self) -> None:
        self._deadline.check()
        await self._scope.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._scope.__aexit__(kind, error, trace)
        except TimeoutError as late:
            raise self._deadline.exceeded() from late
        if isinstance(error, TimeoutError) and self._scope.expired():
            raise self._deadline.exceeded() from error
