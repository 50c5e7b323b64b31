"""Decides which host a node belongs to when several hosts announce it."""

from collections.abc import Callable, Iterable

from loom.bus.host_directory import HostKey

SETTLE_S = 0.5
"""Seconds for the first host to prove that it is alive after a second host has announced the node."""
CONTEST_EVERY_S = 3.0
"""Least seconds between two contests for a node, so that forged hosts cannot keep a node contested."""


class NodeOwnership:
    """Tracks which hosts announce each node, in the order of their first announcement.

    A node belongs to the first of its hosts that is alive. When a second host announces the node, the first host must
    send another message to keep it. A host that was killed and restarted under a new id thus gets its nodes quickly.

    Args:
        clock: Returns monotonic seconds.
        last_seen_at: Returns the time of a host's last message; None for a host that is not present.
    """

    def __init__(self, clock: Callable[[], float], last_seen_at: Callable[[HostKey], float | None]) -> None:
        self._clock = clock
        self._last_seen_at = last_seen_at
        self._hosts: dict[str, dict[HostKey, None]] = {}
        """Qualified node -> its hosts, in the order of their first announcement."""
        self._nodes: dict[HostKey, tuple[str, ...]] = {}
        """Host -> its qualified nodes."""
        self._contested: dict[str, float] = {}
        """Qualified node -> monotonic time of the latest contest."""
        self.size = 0
        """Number of node names; a name counts once per host."""

    def record_announcement(self, host: HostKey, nodes: tuple[str, ...]) -> bool:
        """Record the nodes of a host; return whether a contest for one of them begins."""
        before = self._nodes.get(host)
        if nodes == before:
            return False
        for node in set(before or ()).difference(nodes):
            self._remove_node(node, host)
        self._nodes[host] = nodes
        self.size += len(nodes) - len(before or ())
        contested = [self._add_host(node, host) for node in set(nodes).difference(before or ())]
        return any(contested)

    def _add_host(self, node: str, host: HostKey) -> bool:
        hosts = self._hosts.setdefault(node, {})
        others = bool(hosts)
        hosts[host] = None
        now = self._clock()
        if not others or now < self._contested.get(node, -CONTEST_EVERY_S) + CONTEST_EVERY_S:
            return False
        last_seen_at = self._last_seen_at(host)  # the announcement that begins the contest is a sign of life in it
        self._contested[node] = now if last_seen_at is None else last_seen_at
        return True

    def remove_host(self, host: HostKey) -> None:
        """Remove a host from all of its nodes."""
        nodes = self._nodes.pop(host, ())
        self.size -= len(nodes)
        for node in set(nodes):
            self._remove_node(node, host)

    def _remove_node(self, node: str, host: HostKey) -> None:
        hosts = self._hosts[node]
        hosts.pop(host, None)
        if len(hosts) <= 1:
            self._contested.pop(node, None)
        if not hosts:
            del self._hosts[node]

    def host_of(self, node: str) -> HostKey | None:
        """Return the host that a node belongs to; None when none of its hosts is alive."""
        contested = self._contested.get(node, 0.0)
        return next(iter(self._alive_hosts(self._hosts.get(node, ()), contested)), None)

    def is_contested(self, node: str) -> bool:
        """Return whether a contest for a node is still open."""
        return node in self._contested and self._clock() < self._contested[node] + SETTLE_S

    def _alive_hosts(self, hosts: Iterable[HostKey], since: float) -> list[HostKey]:
        seen = [(host, self._last_seen_at(host)) for host in list(hosts)]
        return [host for host, at in seen if at is not None and at >= since]
