"""Which hosts an auction waits for. Pure but for the clock that is handed in."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet

from loom.bus.host_directory import ALIVE_S, HostKey

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

    def __init__(self, clock: Callable[[], float], most: int, forgotten: Callable[[HostKey], None]) -> None:
        self._clock = clock
        self._most = most
        self._forgotten = forgotten
        self._proven: OrderedDict[HostKey, float] = OrderedDict()
        """Host -> last sign of life; the longest silent first. A plain dict finds its first key in linear time."""
        self._newcomers: OrderedDict[HostKey, float] = OrderedDict()
        self._awaited: set[HostKey] = set()
        """Proven hosts that answer."""
        self._missed: dict[HostKey, int] = {}
        """Host -> answers that would make up for the windows it has missed."""
        self._drops: dict[HostKey, int] = {}
        """Host -> how often it has missed too many."""
        self._dropped: set[HostKey] = set()
        """Hosts that have missed too many, and have not made up for all of them yet."""
        self._returning: set[HostKey] = set()
        """Dropped hosts that have announced themselves since they were last waited for."""
        self._plain: set[HostKey] = set()
        """Hosts of plain nodes alone: they answer no calls."""
        self._newcomers_at = 0.0
        """When newcomers and returning hosts will have been waited for seldom enough again."""

    def __len__(self) -> int:
        return len(self._proven) + len(self._newcomers)

    def seen_at(self, host: HostKey) -> float | None:
        """Return when a present host last gave a sign of life; None for any other."""
        self._expire()
        return self._proven.get(host, self._newcomers.get(host))

    def awaited(self) -> set[HostKey]:
        """Return the hosts whose offers the next auction waits for; one auction of a time includes newcomers."""
        self._expire()
        now = self._clock()
        if self._awaited and self._newcomers_at - now > (BURST - 1) * NEWCOMERS_EVERY_S:
            return set(self._awaited)
        others = (self._returning | (self._newcomers.keys() - self._dropped)) - self._plain
        if others:
            self._newcomers_at = (
                max(self._newcomers_at, now) + NEWCOMERS_EVERY_S
            )  # auctions that begin meanwhile do not wait as well
        return self._awaited | others

    @property
    def has_bidders(self) -> bool:
        """Whether a host is present that answers calls."""
        return len(self) > len(self._plain)

    def is_dropped(self, host: HostKey) -> bool:
        """Return whether a host has missed too many windows."""
        return host in self._dropped

    def announced(self, host: HostKey, *, plain: bool = False) -> None:
        """Record an announcement.

        Args:
            plain: Whether all of the host's nodes are plain: it answers no calls and is never waited for.
        """
        now = self._clock()
        if plain:
            self._plain.add(host)
            self._awaited.discard(host)
        elif host in self._plain:
            self._plain.discard(host)
            self._await_again(host)
        if host in self._proven:
            _move(self._proven, host, now)
            if host in self._dropped:
                self._returning.add(host)
            return
        _move(self._newcomers, host, now)
        self._expire()
        self._trim(host)

    def answered(self, hosts: Iterable[HostKey], missing: AbstractSet[HostKey]) -> None:
        """Record the hosts that answered a call, and those that were waited for in vain."""
        now = self._clock()
        for host in hosts:
            self._newcomers.pop(host, None)
            _move(self._proven, host, now)
            self._make_up(host)
            self._trim(host)
        for host in missing:
            if host in self._proven or host in self._newcomers:  # else it has left meanwhile
                self._miss(host)

    def _trim(self, newest: HostKey) -> None:
        """Forget the hosts that were silent for longest while there are too many: newcomers, and then proven ones."""
        while len(self) > self._most:
            newcomer = next((host for host in self._newcomers if host != newest), None)
            self.forget(newcomer or next(iter(self._proven)))

    def _make_up(self, host: HostKey) -> None:
        missed = self._missed.pop(host, 0)
        if missed > 1:
            self._missed[host] = missed - 1
        else:
            self._dropped.discard(host)
        self._returning.discard(host)
        if host not in self._dropped and host not in self._plain:
            self._awaited.add(host)

    def _await_again(self, host: HostKey) -> None:
        """Wait again for a proven host that has got nodes which bid."""
        if host in self._proven and host not in self._dropped:
            self._awaited.add(host)

    def _miss(self, host: HostKey) -> None:
        self._returning.discard(host)
        if host in self._dropped:
            return
        missed = self._missed.get(host, 0) + ANSWERS
        if missed >= _LIMIT:
            self._dropped.add(host)
            self._awaited.discard(host)
            drops = self._drops[host] = self._drops.get(host, 0) + 1
            missed = _LIMIT * 2 ** min(drops - 1, MAX_DOUBLINGS)
        self._missed[host] = missed

    def forget(self, host: HostKey) -> None:
        """Forget a host."""
        self._proven.pop(host, None)
        self._newcomers.pop(host, None)
        self._missed.pop(host, None)
        self._drops.pop(host, None)
        for hosts in (self._awaited, self._dropped, self._returning, self._plain):
            hosts.discard(host)
        self._forgotten(host)

    def forget_newcomer(self) -> bool:
        """Forget the newcomer that was silent for longest; return whether there was one."""
        oldest = next(iter(self._newcomers), None)
        if oldest is not None:
            self.forget(oldest)
        return oldest is not None

    def _expire(self) -> None:
        since = self._clock() - ALIVE_S
        for known in (self._proven, self._newcomers):
            while known and known[oldest := next(iter(known))] < since:
                self.forget(oldest)


def _move(known: OrderedDict[HostKey, float], host: HostKey, now: float) -> None:
    """Set a host's time and put it behind all others."""
    known[host] = now
    known.move_to_end(host)
