"""Which host a node belongs to, where more than one announces it."""

from collections.abc import Callable, Iterable

from loom.bus.host_directory import HostKey

SETTLE_S = 0.5
"""How long after a second host has announced a node the first one has to show that it is alive."""
CONTEST_EVERY_S = 3.0
"""A contest within this time of the one before changes nothing: made-up hosts cannot keep a node contested."""


class Claims:
    """Nodes and the hosts that announce them, in the order in which they first did.

    A node belongs to the first of its hosts that is alive. When a second host announces the node, the first has to
    give a sign of life after that: a host that was killed and came back under another id gets its nodes at once.

    Args:
        clock: Returns seconds that never go back.
        seen_at: Returns when a host last gave a sign of life; None when it has gone.
    """

    def __init__(self, clock: Callable[[], float], seen_at: Callable[[HostKey], float | None]) -> None:
        self._clock = clock
        self._seen_at = seen_at
        self._hosts: dict[str, dict[HostKey, None]] = {}
        """Node, qualified by its owner -> its hosts, in the order of their first announcement."""
        self._nodes: dict[HostKey, tuple[str, ...]] = {}
        """Host -> its nodes."""
        self._contested: dict[str, float] = {}
        """Node -> when another host announced it."""
        self.size = 0
        """Names of nodes that are kept, those of each host counted."""

    def announce(self, host: HostKey, nodes: tuple[str, ...]) -> bool:
        """Record the nodes of a host; return whether one of them has another host and a contest begins."""
        before = self._nodes.get(host)
        if nodes == before:
            return False
        for node in set(before or ()).difference(nodes):
            self._drop(node, host)
        self._nodes[host] = nodes
        self.size += len(nodes) - len(before or ())
        contested = [self._claim(node, host) for node in set(nodes).difference(before or ())]
        return any(contested)

    def _claim(self, node: str, host: HostKey) -> bool:
        hosts = self._hosts.setdefault(node, {})
        others = bool(hosts)
        hosts[host] = None
        now = self._clock()
        if not others or now < self._contested.get(node, -CONTEST_EVERY_S) + CONTEST_EVERY_S:
            return False
        seen_at = self._seen_at(host)  # the announcement that begins the contest is a sign of life in it
        self._contested[node] = now if seen_at is None else seen_at
        return True

    def forget(self, host: HostKey) -> None:
        """Forget a host and its claims."""
        nodes = self._nodes.pop(host, ())
        self.size -= len(nodes)
        for node in set(nodes):
            self._drop(node, host)

    def _drop(self, node: str, host: HostKey) -> None:
        hosts = self._hosts[node]
        hosts.pop(host, None)
        if len(hosts) <= 1:
            self._contested.pop(node, None)
        if not hosts:
            del self._hosts[node]

    def host_of(self, node: str) -> HostKey | None:
        """Return the host a node belongs to; None when no host that announces it is alive."""
        contested = self._contested.get(node, 0.0)
        return next(iter(self._alive(self._hosts.get(node, ()), contested)), None)

    def is_open(self, node: str) -> bool:
        """Return whether it is not settled yet to which of several hosts a node belongs."""
        return node in self._contested and self._clock() < self._contested[node] + SETTLE_S

    def _alive(self, hosts: Iterable[HostKey], since: float) -> list[HostKey]:
        seen = [(host, self._seen_at(host)) for host in list(hosts)]
        return [host for host, at in seen if at is not None and at >= since]
