"""When a host announces itself on request."""

import asyncio
import random
import time
from collections.abc import Callable

PAUSE_S = 0.1
"""Longest pause before an answer to `loom.hosts`, so that many hosts do not answer in one moment."""
EVERY_S = 1.0
BURST = 4
"""Answers in a row after a quiet time; then one in each EVERY_S."""


class AnnouncePace:
    """Announces a host on request: at most once a second on average, several requests at once by one announcement.

    Args:
        announce: Starts an announcement.
        clock: Returns seconds that never go back.
    """

    def __init__(self, announce: Callable[[], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._announce = announce
        self._clock = clock
        self._next_at = 0.0
        """When a next announcement would be due at the average rate."""
        self._timer: asyncio.TimerHandle | None = None

    def request(self, *, at_random: bool = True) -> None:
        """Have the host announced soon; without effect while an announcement is due anyway.

        Args:
            at_random: Whether to pause for a random time first, as other hosts have had the same request.
        """
        if self._timer is not None:
            return
        now = self._clock()
        begin = max(now, self._next_at - (BURST - 1) * EVERY_S)
        self._next_at = max(self._next_at, now) + EVERY_S
        pause_s = random.uniform(0.0, PAUSE_S) if at_random else 0.0  # noqa: S311 - not a secret
        self._timer = asyncio.get_running_loop().call_later(begin - now + pause_s, self._due)

    def stop(self) -> None:
        """Announce nothing more."""
        if self._timer is not None:
            self._timer.cancel()

    def _due(self) -> None:
        self._timer = None
        self._announce()
