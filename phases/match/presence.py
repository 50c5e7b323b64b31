"""Which hosts an auction waits for. Pure but for the clock that is handed in."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet

HEARD_S = 10.0
"""Hosts announce themselves every 3 s; one that is silent for this long has gone."""
MISSED_WINDOWS = 3
"""Auctions after whose windows a host that does not answer is not waited for."""
NEWCOMERS_EVERY_S = 1.0
"""Hosts that have not offered yet are waited for in one auction of this time: announcing is free, offering is not."""


class Presence:
    """Remembers hosts by their signs of life: in a time that does not depend on how many there are.

    An offer proves a host. A host that has only announced itself is a newcomer: it is called like all others, but
    seldom waited for, so that made-up hosts cannot slow every auction.

    Args:
        clock: Returns seconds that never go back.
        most: Hosts remembered at most; newcomers are forgotten first, the one longest silent before the others.
        forgotten: Called with each host that is forgotten.
    """

    def __init__(self, clock: Callable[[], float], most: int, forgotten: Callable[[str], None]) -> None:
        self._clock = clock
        self._most = most
        self._forgotten = forgotten
        self._proven: OrderedDict[str, float] = OrderedDict()
        """Host -> last sign of life; the longest silent first. A plain dict finds its first key in linear time."""
        self._newcomers: OrderedDict[str, float] = OrderedDict()
        self._awaited: set[str] = set()
        """Proven hosts that answer."""
        self._missed: dict[str, int] = {}
        self._newcomers_at = 0.0
        """From when newcomers may be waited for again."""

    def __len__(self) -> int:
        return len(self._proven) + len(self._newcomers)

    def seen_at(self, host_id: str) -> float | None:
        """Return when a present host last gave a sign of life; None for any other."""
        self._expire()
        return self._proven.get(host_id, self._newcomers.get(host_id))

    def awaited(self) -> set[str]:
        """Return the hosts whose offers the next auction waits for."""
        self._expire()
        if self._awaited and self._clock() < self._newcomers_at:
            return set(self._awaited)
        return self._awaited | {host for host in self._newcomers if self._missed.get(host, 0) < MISSED_WINDOWS}

    def announced(self, host_id: str) -> None:
        """Record an announcement."""
        now = self._clock()
        if host_id in self._awaited:
            _move(self._proven, host_id, now)
            return
        if self._proven.pop(host_id, None) is not None:
            self._missed.pop(host_id, None)  # one that has missed windows gets another chance
        _move(self._newcomers, host_id, now)
        self._expire()
        while len(self) > self._most:
            self.forget(next(iter(self._newcomers)))

    def answered(self, host_ids: Iterable[str], missing: AbstractSet[str]) -> None:
        """Record who answered a call, and who was waited for in vain."""
        now = self._clock()
        newcomers = False
        for host_id in host_ids:
            newcomers |= self._newcomers.pop(host_id, None) is not None
            _move(self._proven, host_id, now)
            self._awaited.add(host_id)
            self._missed.pop(host_id, None)
        for host_id in missing:
            if host_id in self._newcomers:
                newcomers = True
            elif host_id not in self._awaited:
                continue  # it has left meanwhile
            self._missed[host_id] = self._missed.get(host_id, 0) + 1
            if self._missed[host_id] >= MISSED_WINDOWS:
                self._awaited.discard(host_id)
        if newcomers:
            self._newcomers_at = now + NEWCOMERS_EVERY_S

    def forget(self, host_id: str) -> None:
        """Forget a host."""
        self._proven.pop(host_id, None)
        self._newcomers.pop(host_id, None)
        self._missed.pop(host_id, None)
        self._awaited.discard(host_id)
        self._forgotten(host_id)

    def forget_newcomer(self) -> bool:
        """Forget the newcomer that was silent for longest; return whether there was one."""
        oldest = next(iter(self._newcomers), None)
        if oldest is not None:
            self.forget(oldest)
        return oldest is not None

    def _expire(self) -> None:
        since = self._clock() - HEARD_S
        for known in (self._proven, self._newcomers):
            while known and known[oldest := next(iter(known))] < since:
                self.forget(oldest)


def _move(known: OrderedDict[str, float], host_id: str, now: float) -> None:
    """Set a host's time and put it behind all others."""
    known[host_id] = now
    known.move_to_end(host_id)
