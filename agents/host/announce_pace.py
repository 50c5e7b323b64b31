"""Limits the rate at which a host announces itself on request."""

import asyncio
import random
import time
from collections.abc import Callable

from loom.agents.host.timings import HostTimings

BURST = 4
"""Announcements on request without delay after a quiet period; then they keep the average interval."""


class AnnouncePace:
    """Announces a host on request, at most once a second on average; pending requests share one announcement.

    Args:
        announce: Starts an announcement.
        timings: Times of the host.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self,
        announce: Callable[[], object],
        timings: HostTimings = HostTimings(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._announce = announce
        self._interval_s, self._max_delay_s = timings.requested_announce_s, timings.max_announce_delay_s
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
        start_at = max(now, self._next_at - (BURST - 1) * self._interval_s)
        self._next_at = max(self._next_at, now) + self._interval_s
        delay_s = random.uniform(0.0, self._max_delay_s) if at_random else 0.0  # noqa: S311 - not a secret
        self._timer = asyncio.get_running_loop().call_later(start_at - now + delay_s, self._announce_now)

    def stop(self) -> None:
        """Cancel the scheduled announcement."""
        if self._timer is not None:
            self._timer.cancel()

    def _announce_now(self) -> None:
        self._timer = None
        self._announce()
