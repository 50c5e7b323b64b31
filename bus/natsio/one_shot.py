"""Something that is to come: waited for with a limit, at a fraction of what asyncio.timeout costs."""

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class Awaited(Generic[T]):
    """The first value that is given to it. One at a time may wait for it, as often as it likes."""

    __slots__ = ("_waiting", "value")

    def __init__(self) -> None:
        self.value: T | None = None
        self._waiting: asyncio.Future[None] | None = None

    def give(self, value: T) -> None:
        """Set the value and wake whoever waits; a second one is left out."""
        if self.value is None:
            self.value = value
            self.wake()

    def wake(self) -> None:
        """End the wait that is going on, with a value or without."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def wait(self, seconds: float) -> T | None:
        """Return the value; None when there is none in time, or somebody calls `wake` before."""
        if self.value is None and seconds > 0:
            timer = asyncio.get_running_loop().call_later(seconds, self.wake)
            try:
                await self.woken()
            finally:
                timer.cancel()
        return self.value

    async def woken(self) -> T | None:
        """Return the value; None when somebody calls `wake` before there is one, which is the only end of the wait."""
        if self.value is None:
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        return self.value
