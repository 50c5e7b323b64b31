"""Who may be handled beside whom: suspects alone, all others together."""

import asyncio
from collections import deque


class SharedExclusiveLock:
    """Many holders at once, or one alone.

    A message that was delivered several times may be what kills the process. It is handled alone, so that
    its neighbours' delivery counts do not grow with its own. Those who wait to be alone go first, in order.
    """

    def __init__(self) -> None:
        self._together = 0
        self._alone = False
        self._waiting_alone: deque[asyncio.Future[None]] = deque()
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self, *, alone: bool) -> None:
        """Wait until there is room; every `enter` needs one `leave`."""
        if not (self._alone or self._waiting_alone or (alone and self._together)):
            self._take(alone=alone)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._waiting_alone if alone else self._waiting
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                if turn in queue:
                    queue.remove(turn)
                self._wake()
            else:  # the turn came together with the cancellation
                self.leave(alone=alone)
            raise

    def leave(self, *, alone: bool) -> None:
        """Give the room back."""
        if alone:
            self._alone = False
        else:
            self._together -= 1
        self._wake()

    def _take(self, *, alone: bool) -> None:
        if alone:
            self._alone = True
        else:
            self._together += 1

    def _wake(self) -> None:
        """Hand the room to those whose turn it is."""
        if self._waiting_alone:
            if not (self._alone or self._together):
                self._give_turn(self._waiting_alone, alone=True)
        elif not self._alone:
            while self._waiting:
                self._give_turn(self._waiting, alone=False)

    def _give_turn(self, queue: deque[asyncio.Future[None]], *, alone: bool) -> None:
        turn = queue.popleft()
        if not turn.done():  # else cancelled: its task will wake the next
            self._take(alone=alone)
            turn.set_result(None)
