"""Limits the rate at which a host announces itself on request."""

import asyncio
import random
import time
from collections.abc import Callable

RANDOM_DELAY_S = 0.1
"""Longest random delay of an announcement on request, so that many hosts do not announce at the same moment."""
EVERY_S = 1.0
BURST = 4
"""Announcements without delay after a quiet period; then one per EVERY_S."""


class AnnouncePace:
    """Announces a host on request, at most once a second on average; pending requests share one announcement.

    Args:
        announce: Starts an announcement.
        clock: Returns monotonic seconds.
    """

    def __init__(self, announce: Callable[[], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._announce = announce
        self._clock = clock
        self._next_at = 0.0
        """Time of the next announcement at the average rate."""
        self._timer: asyncio.TimerHandle | None = None

    def request(self, *, at_random: bool = True) -> None:
        """Schedule an announcement, unless one is scheduled already.

        Args:
            at_random: Whether to add a random delay, because other hosts got the same request.
        """
        if self._timer is not None:
            return
        now = self._clock()
        start_at = max(now, self._next_at - (BURST - 1) * EVERY_S)
        self._next_at = max(self._next_at, now) + EVERY_S
        delay_s = random.uniform(0.0, RANDOM_DELAY_S) if at_random else 0.0  # noqa: S311 - not a secret
        self._timer = asyncio.get_running_loop().call_later(start_at - now + delay_s, self._announce_now)

    def stop(self) -> None:
        """Cancel the scheduled announcement."""
        if self._timer is not None:
            self._timer.cancel()

    def _announce_now(self) -> None:
        self._timer = None
        self._announce()
