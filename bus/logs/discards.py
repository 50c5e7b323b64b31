"""Messages that the readers of a process leave out: counted by kind and host, and logged at a bounded rate."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

from loom.bus.logs.left_out import MAX_HOSTS, LeftOut, Part
from loom.bus.logs.logger import get_logger
from loom.schemas.base import cut_name

log = get_logger()

PERIOD_S = 10.0
LINES = 20
"""Lines of one kind logged in a period; the messages beyond are only counted."""


class Discards:
    """Counts of discarded messages, by the name of the log event.

    Args:
        now: Monotonic time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.counts: Counter[str] = Counter()
        self.hosts: OrderedDict[str, LeftOut] = OrderedDict()
        """Host -> what was left out of its messages: the 100 hosts of which it was lately."""
        self._now = now
        self._periods: dict[str, tuple[float, int]] = {}
        """event -> start of its period, and the lines logged in it."""

    def add(self, event: str, *, reason: str, **facts: Any) -> None:
        """Count one discarded message, and log it unless its kind has filled its share of the log."""
        self.counts[event] += 1
        now = self._now()
        started, lines = self._periods.get(event, (now, 0))
        if now - started >= PERIOD_S:
            started, lines = now, 0
        self._periods[event] = started, lines + 1
        if lines < LINES:
            log.warning(event, reason=reason[:500], total=self.counts[event], **facts)

    def of_host(self, host_id: str, part: Part, event: str, *, reason: str, **facts: Any) -> None:
        """Count one discarded message, or part of one, of a node host besides."""
        key = cut_name(host_id)
        self.hosts[key] = self.hosts.pop(key, LeftOut()).plus(part, reason, time.time())
        if len(self.hosts) > MAX_HOSTS:
            self.hosts.popitem(last=False)
        self.add(event, reason=reason, host_id=key, **facts)
