"""Counts the messages that a process discards, by kind and host, and logs them at a bounded rate."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

from loom.bus.logs.discard_reports import MAX_HOSTS, DiscardReport, Part
from loom.bus.logs.logger import get_logger
from loom.schemas.base import cut_name

log = get_logger()

PERIOD_S = 10.0
LINES = 20
"""Most lines of one kind in a period; further messages are only counted."""


class Discards:
    """Counts of discarded messages, by the name of the log event.

    Args:
        now: Monotonic time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.counts: Counter[str] = Counter()
        self.hosts: OrderedDict[str, DiscardReport] = OrderedDict()
        """Host -> what was discarded of its messages, for the 100 hosts with the newest discards."""
        self._now = now
        self._periods: dict[str, tuple[float, int]] = {}
        """Event -> start of its period, and the number of lines in it."""

    def add(self, event: str, *, reason: str, **facts: Any) -> None:
        """Count a discarded message, and log it unless the period has enough lines of its kind.

        Args:
            event: Name of the log event, and kind of the message.
            reason: Why it was discarded; truncated to 500 characters.
            facts: Further fields of the log event.
        """
        self.counts[event] += 1
        now = self._now()
        started, lines = self._periods.get(event, (now, 0))
        if now - started >= PERIOD_S:
            started, lines = now, 0
        self._periods[event] = started, lines + 1
        if lines < LINES:
            log.warning(event, reason=reason[:500], total=self.counts[event], **facts)

    def add_from_host(self, host_id: str, part: Part, event: str, *, reason: str, **facts: Any) -> None:
        """Count a discarded message of a node host, or a part of one, also for that host."""
        key = cut_name(host_id)
        self.hosts[key] = self.hosts.pop(key, DiscardReport()).plus(part, reason, time.time())
        if len(self.hosts) > MAX_HOSTS:
            self.hosts.popitem(last=False)
        self.add(event, reason=reason, host_id=key, **facts)
