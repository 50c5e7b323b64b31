"""Which hosts an auction waits for. Pure but for the clock that is handed in."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet

HEARD_S = 10.0
"""Hosts announce themselves every 3 s; one that is silent for this long has gone."""
MISSED_WINDOWS = 3
"""Windows after which a host that does not answer is not waited for."""
ANSWERS = 4
"""Answers that make up for a missed window: a host that answers some calls and not others is not waited for either."""
MAX_DOUBLINGS = 6
"""A host that misses too many again has to answer twice as often as before, up to so many doublings."""
NEWCOMERS_EVERY_S = 2.0
"""Hosts that have not offered yet are waited for in one auction of this time: announcing is free, offering is not."""
BURST = 2
"""Auctions in a row that may do so after a time without one: hosts that join one after the other are all found."""

_LIMIT = MISSED_WINDOWS * ANSWERS


class Presence:
    """Remembers hosts by their signs of life: in a time that does not depend on how many there are.

    An offer proves a host. A host that has only announced itself is a newcomer: it is called like all others, but
    seldom waited for, so that made-up hosts cannot slow every auction. The same holds for one that misses windows,
    until it has answered often enough.

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
        """Host -> answers that would make up for the windows it has missed."""
        self._drops: dict[str, int] = {}
        """Host -> how often it has missed too many."""
        self._dropped: set[str] = set()
        """Hosts that have missed too many, and have not made up for all of them yet."""
        self._returning: set[str] = set()
        """Dropped hosts that have announced themselves since they were last waited for."""
        self._newcomers_at = 0.0
        """When newcomers and returning hosts will have been waited for seldom enough again."""

    def __len__(self) -> int:
        return len(self._proven) + len(self._newcomers)

    def seen_at(self, host_id: str) -> float | None:
        """Return when a present host last gave a sign of life; None for any other."""
        self._expire()
        return self._proven.get(host_id, self._newcomers.get(host_id))

    def awaited(self) -> set[str]:
        """Return the hosts whose offers the next auction waits for; one auction of a time includes newcomers."""
        self._expire()
        now = self._clock()
        if self._awaited and self._newcomers_at - now > (BURST - 1) * NEWCOMERS_EVERY_S:
            return set(self._awaited)
        others = self._returning | (self._newcomers.keys() - self._dropped)
        if others:
            self._newcomers_at = (
                max(self._newcomers_at, now) + NEWCOMERS_EVERY_S
            )  # auctions that begin meanwhile do not wait as well
        return self._awaited | others

    def announced(self, host_id: str) -> None:
        """Record an announcement."""
        now = self._clock()
        if host_id in self._proven:
            _move(self._proven, host_id, now)
            if host_id in self._dropped:
                self._returning.add(host_id)
            return
        _move(self._newcomers, host_id, now)
        self._expire()
        self._trim(host_id)

    def answered(self, host_ids: Iterable[str], missing: AbstractSet[str]) -> None:
        """Record the hosts that answered a call, and those that were waited for in vain."""
        now = self._clock()
        for host_id in host_ids:
            self._newcomers.pop(host_id, None)
            _move(self._proven, host_id, now)
            self._make_up(host_id)
            self._trim(host_id)
        for host_id in missing:
            if host_id in self._proven or host_id in self._newcomers:  # else it has left meanwhile
                self._miss(host_id)

    def _trim(self, newest: str) -> None:
        """Forget the hosts that were silent for longest while there are too many: newcomers, and then proven ones."""
        while len(self) > self._most:
            newcomer = next((host_id for host_id in self._newcomers if host_id != newest), None)
            self.forget(newcomer or next(iter(self._proven)))

    def _make_up(self, host_id: str) -> None:
        missed = self._missed.pop(host_id, 0)
        if missed > 1:
            self._missed[host_id] = missed - 1
        else:
            self._dropped.discard(host_id)
        self._returning.discard(host_id)
        if host_id not in self._dropped:
            self._awaited.add(host_id)

    def _miss(self, host_id: str) -> None:
        self._returning.discard(host_id)
        if host_id in self._dropped:
            return
        missed = self._missed.get(host_id, 0) + ANSWERS
        if missed >= _LIMIT:
            self._dropped.add(host_id)
            self._awaited.discard(host_id)
            drops = self._drops[host_id] = self._drops.get(host_id, 0) + 1
            missed = _LIMIT * 2 ** min(drops - 1, MAX_DOUBLINGS)
        self._missed[host_id] = missed

    def forget(self, host_id: str) -> None:
        """Forget a host."""
        self._proven.pop(host_id, None)
        self._newcomers.pop(host_id, None)
        self._missed.pop(host_id, None)
        self._drops.pop(host_id, None)
        for hosts in (self._awaited, self._dropped, self._returning):
            hosts.discard(host_id)
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
