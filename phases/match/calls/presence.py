"""Decides which hosts an auction waits for. Pure except for the clock, which is passed in."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet

from loom.bus.host_directory import ALIVE_S, HostKey
from loom.phases.match.timings import MatchTimings

MAX_MISSED_WINDOWS = 3
"""Number of bid windows a host may miss before auctions stop waiting for it."""
ANSWERS_PER_MISS = 4
"""Number of answers that offset one missed window: auctions do not wait for a host that answers only some calls."""
MAX_DOUBLINGS = 6
"""Each time a host is dropped, the number of answers it needs to return doubles, up to this many times."""
UNPROVEN_BURST = 2
"""Number of auctions in a row that wait for unproven hosts after a pause: hosts may join one after another."""

_DROP_AT = MAX_MISSED_WINDOWS * ANSWERS_PER_MISS


class HostPresence:
    """Tracks which hosts are alive and which of them answer calls for bids, in constant time per message.

    A host is proven once it has made an offer, and unproven while it has only announced itself. Unproven hosts get
    every call, but few auctions wait for them, so that forged hosts cannot slow every auction. A host that misses
    windows is dropped from the awaited hosts in the same way, until it has answered often enough.

    Args:
        clock: Returns monotonic seconds.
        max_hosts: Limit of tracked hosts. Unproven hosts are removed first, in the order of their last message.
        on_removed: Called with each removed host.
        unproven_every_s: Seconds per auction that also waits for unproven hosts.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        max_hosts: int,
        on_removed: Callable[[HostKey], None],
        *,
        unproven_every_s: float = MatchTimings.unproven_every_s,
    ) -> None:
        self._clock = clock
        self._max_hosts = max_hosts
        self._on_removed = on_removed
        self._unproven_every_s = unproven_every_s
        self._proven: OrderedDict[HostKey, float] = OrderedDict()
        """Host -> time of its last message, oldest first. A plain dict would find its first key in linear time."""
        self._unproven: OrderedDict[HostKey, float] = OrderedDict()
        self._awaited: set[HostKey] = set()
        """Proven hosts that answer calls."""
        self._missed: dict[HostKey, int] = {}
        """Host -> number of answers that would offset its missed windows."""
        self._drops: dict[HostKey, int] = {}
        """Host -> how often it was dropped."""
        self._dropped: set[HostKey] = set()
        """Hosts that have missed too many windows and not offset them yet."""
        self._returning: set[HostKey] = set()
        """Dropped hosts that have announced themselves since an auction last waited for them."""
        self._plain: set[HostKey] = set()
        """Hosts with plain nodes only, which do not answer calls."""
        self._untried: set[HostKey] = set()
        """Unproven hosts that answer calls and are not dropped."""
        self._unproven_wait_at = 0.0
        """Monotonic time from which a full burst of auctions may wait for unproven and returning hosts."""

    def __len__(self) -> int:
        return len(self._proven) + len(self._unproven)

    def last_seen_at(self, host: HostKey) -> float | None:
        """Return the monotonic time of a host's last message; None for a host that is not present."""
        self._expire()
        return self._proven.get(host, self._unproven.get(host))

    def awaited_hosts(self) -> set[HostKey]:
        """Return the hosts whose offers the next auction waits for; unproven hosts are included only now and then."""
        self._expire()
        now = self._clock()
        if self._awaited and self._unproven_wait_at - now > (UNPROVEN_BURST - 1) * self._unproven_every_s:
            return set(self._awaited)
        others = self._returning | self._untried
        if others:
            # Set at once, so that concurrent auctions do not wait as well.
            self._unproven_wait_at = max(self._unproven_wait_at, now) + self._unproven_every_s
        return self._awaited | others

    @property
    def bidding_hosts(self) -> int:
        """Number of present hosts that answer calls."""
        return len(self) - len(self._plain)

    def is_dropped(self, host: HostKey) -> bool:
        """Return whether a host has missed too many windows and not offset them yet."""
        return host in self._dropped

    def record_announcement(self, host: HostKey, *, plain: bool = False) -> None:
        """Record an announcement.

        Args:
            plain: Whether all nodes of the host are plain: it does not answer calls, and no auction waits for it.
        """
        now = self._clock()
        if plain:
            self._plain.add(host)
            for hosts in (self._awaited, self._returning, self._untried):
                hosts.discard(host)
        elif host in self._plain:
            self._plain.discard(host)
            self._await_again(host)
        if host in self._proven:
            _touch(self._proven, host, now)
            if host in self._dropped and not plain:
                self._returning.add(host)
            return
        _touch(self._unproven, host, now)
        if host not in self._dropped and not plain:
            self._untried.add(host)
        self._expire()
        self._remove_excess(host)

    def record_answers(self, hosts: Iterable[HostKey], missing: AbstractSet[HostKey]) -> None:
        """Record the hosts that answered a call, and the awaited hosts that did not."""
        now = self._clock()
        for host in hosts:
            self._unproven.pop(host, None)
            self._untried.discard(host)
            _touch(self._proven, host, now)
            self._on_answer(host)
            self._remove_excess(host)
        for host in missing:
            if host in self._proven or host in self._unproven:  # else the host has left
                self._on_missed_window(host)

    def _remove_excess(self, newest: HostKey) -> None:
        """Remove hosts above the limit: unproven ones first, and those with the oldest message first."""
        while len(self) > self._max_hosts:
            unproven = next((host for host in self._unproven if host != newest), None)
            self.remove(unproven or next(iter(self._proven)))

    def _on_answer(self, host: HostKey) -> None:
        missed = self._missed.pop(host, 0)
        if missed > 1:
            self._missed[host] = missed - 1
        else:
            self._dropped.discard(host)
        self._returning.discard(host)
        if host not in self._dropped and host not in self._plain:
            self._awaited.add(host)

    def _await_again(self, host: HostKey) -> None:
        """Add a proven host that has nodes which bid again to the awaited hosts."""
        if host in self._proven and host not in self._dropped:
            self._awaited.add(host)

    def _on_missed_window(self, host: HostKey) -> None:
        self._returning.discard(host)
        if host in self._dropped:
            return
        missed = self._missed.get(host, 0) + ANSWERS_PER_MISS
        if missed >= _DROP_AT:
            self._dropped.add(host)
            self._awaited.discard(host)
            self._untried.discard(host)
            drops = self._drops[host] = self._drops.get(host, 0) + 1
            missed = _DROP_AT * 2 ** min(drops - 1, MAX_DOUBLINGS)
        self._missed[host] = missed

    def remove(self, host: HostKey) -> None:
        """Remove a host."""
        self._proven.pop(host, None)
        self._unproven.pop(host, None)
        self._missed.pop(host, None)
        self._drops.pop(host, None)
        for hosts in (self._awaited, self._dropped, self._returning, self._plain, self._untried):
            hosts.discard(host)
        self._on_removed(host)

    def remove_oldest_unproven(self) -> bool:
        """Remove the unproven host with the oldest message; return whether there was one."""
        oldest = next(iter(self._unproven), None)
        if oldest is not None:
            self.remove(oldest)
        return oldest is not None

    def _expire(self) -> None:
        since = self._clock() - ALIVE_S
        for hosts in (self._proven, self._unproven):
            while hosts and hosts[oldest := next(iter(hosts))] < since:
                self.remove(oldest)


def _touch(hosts: OrderedDict[HostKey, float], host: HostKey, now: float) -> None:
    """Set the time of a host's last message and move the host to the end."""
    hosts[host] = now
    hosts.move_to_end(host)
