"""Limits how often something happens for each of many keys."""

import time
from collections.abc import Callable, Hashable


class Pace:
    """Allows one event per key and period.

    Args:
        period_s: Seconds.
        clock: Returns monotonic seconds.
    """

    def __init__(self, period_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._period_s = period_s
        self._clock = clock
        self._recent: dict[Hashable, float] = {}
        """Key of an event within the last period -> its time, oldest first."""

    def allows(self, key: Hashable) -> bool:
        """Return whether an event may happen now; if so, it counts."""
        now = self._clock()
        while self._recent and now - next(iter(self._recent.values())) >= self._period_s:
            del self._recent[next(iter(self._recent))]
        if key in self._recent:
            return False
        self._recent[key] = now
        return True
