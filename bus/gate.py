"""Who may be handled beside whom: suspects alone, all others together."""

import asyncio
from collections import deque


class Gate:
    """Many holders at once, or one alone.

    A message that was delivered several times may be what kills the process. It is handled alone, so that
    its neighbours' delivery counts do not grow with its own. Those who wait to be alone go first.
    """

    def __init__(self) -> None:
        self._together = 0
        self._alone = False
        self._waiting_alone: deque[asyncio.Future[None]] = deque()
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self, *, alone: bool) -> None:
        """Wait until there is room; every `enter` needs one `leave`."""
        while self._alone or (self._together if alone else self._waiting_alone):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            queue = self._waiting_alone if alone else self._waiting
            queue.append(turn)
            try:
                await turn
            finally:
                if turn in queue:
                    queue.remove(turn)
                    self._wake()
        if alone:
            self._alone = True
        else:
            self._together += 1

    def leave(self, *, alone: bool) -> None:
        """Give the room back."""
        if alone:
            self._alone = False
        else:
            self._together -= 1
        self._wake()

    def _wake(self) -> None:
        if self._alone:
            return
        if self._waiting_alone:
            if not self._together:
                _resolve(self._waiting_alone[0])
            return
        for turn in self._waiting:
            _resolve(turn)


def _resolve(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
