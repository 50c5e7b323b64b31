"""Deadlines that are enforced on the code of a job."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable
from types import TracebackType
from typing import TypeVar, cast

from loom.agents.user_code import ClosingIterator
from loom.schemas.errors import DeadlineExceeded

T = TypeVar("T")

_END = object()


class Deadline:
    """A deadline on the clock of the running event loop; code that waits past it raises DeadlineExceeded.

    Args:
        seconds: Seconds from now.
        early_s: Seconds by which the deadline is moved forward, at most a tenth of `seconds`. The job can then report
            its costs before the deadline of its caller.
    """

    def __init__(self, seconds: float, *, early_s: float = 0.0) -> None:
        self._seconds = seconds
        self._now = asyncio.get_running_loop().time
        self._at = self._now() + seconds - min(early_s, seconds / 10)

    @property
    def left(self) -> float:
        """Seconds left, 0 or more."""
        return max(0.0, self._at - self._now())

    def check(self) -> None:
        """Raise DeadlineExceeded if the deadline has passed."""
        if self._now() >= self._at:
            raise self.exceeded()

    def enforced(self) -> "Enforced":
        """Return an async context manager that cancels its body at the deadline."""
        return Enforced(self, asyncio.timeout_at(self._at))

    async def each(self, source: AsyncIterable[T]) -> AsyncGenerator[T, None]:
        """Yield the items of `source` until the deadline, and close it at the end."""
        async with ClosingIterator(source) as items:
            while True:
                async with self.enforced():
                    item = await anext(items, _END)
                if item is _END:
                    return
                yield cast("T", item)

    def exceeded(self) -> DeadlineExceeded:
        """Return the error for work that missed the deadline."""
        return DeadlineExceeded(f"not done within {self._seconds:g} s")


class Enforced:
    """Cancels the body of an `async with` at a deadline; a class, because `asynccontextmanager` takes longer."""

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
