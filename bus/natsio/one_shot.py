"""A value that is set once and awaited with a time limit, at a fraction of the cost of asyncio.timeout."""

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class OneShot(Generic[T]):
    """Holds the first value that is set. One task at a time may wait for it, any number of times."""

    __slots__ = ("_waiting", "value")

    def __init__(self) -> None:
        self.value: T | None = None
        self._waiting: asyncio.Future[None] | None = None

    def set(self, value: T) -> None:
        """Set the value and wake the waiting task; further values are ignored."""
        if self.value is None:
            self.value = value
            self.wake()

    def wake(self) -> None:
        """End the current wait, with a value or without one."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def wait(self, seconds: float) -> T | None:
        """Return the value; None if it is not set within `seconds`, or `wake` is called first."""
        if self.value is None and seconds > 0:
            timer = asyncio.get_running_loop().call_later(seconds, self.wake)
            try:
                self._waiting = asyncio.get_running_loop().create_future()
                await self._waiting
            finally:
                timer.cancel()
                self._waiting = None
        return self.value
