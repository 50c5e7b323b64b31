"""A lock that runs suspected poison messages one at a time and all other messages concurrently."""

import asyncio
from collections import deque


class SharedExclusiveLock:
    """A lock with many shared holders or one exclusive holder.

    A message that was delivered several times may be what ends the process. It is handled exclusively, so that the
    delivery counts of other messages do not grow with its own. Waiting exclusive holders go first, in order.
    """

    def __init__(self) -> None:
        self._shared_holders = 0
        self._has_exclusive_holder = False
        self._waiting_exclusive: deque[asyncio.Future[None]] = deque()
        self._waiting_shared: deque[asyncio.Future[None]] = deque()

    async def acquire(self, *, exclusive: bool) -> None:
        """Wait until the lock is held; every `acquire` needs one `release` with the same argument."""
        if not (self._has_exclusive_holder or self._waiting_exclusive or (exclusive and self._shared_holders)):
            self._add_holder(exclusive=exclusive)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._waiting_exclusive if exclusive else self._waiting_shared
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                if turn in queue:
                    queue.remove(turn)
                self._wake()
            else:  # the turn came together with the cancellation
                self.release(exclusive=exclusive)
            raise

    def release(self, *, exclusive: bool) -> None:
        """Release the lock, and wake the tasks that can hold it next."""
        if exclusive:
            self._has_exclusive_holder = False
        else:
            self._shared_holders -= 1
        self._wake()

    def _add_holder(self, *, exclusive: bool) -> None:
        if exclusive:
            self._has_exclusive_holder = True
        else:
            self._shared_holders += 1

    def _wake(self) -> None:
        if self._waiting_exclusive:
            if not (self._has_exclusive_holder or self._shared_holders):
                self._wake_next(self._waiting_exclusive, exclusive=True)
        elif not self._has_exclusive_holder:
            while self._waiting_shared:
                self._wake_next(self._waiting_shared, exclusive=False)

    def _wake_next(self, queue: deque[asyncio.Future[None]], *, exclusive: bool) -> None:
        turn = queue.popleft()
        if not turn.done():  # a cancelled task wakes the next one itself
            self._add_holder(exclusive=exclusive)
            turn.set_result(None)
