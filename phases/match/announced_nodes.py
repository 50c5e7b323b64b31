"""An index of the nodes that present hosts have announced, by domain."""

from collections import Counter
from collections.abc import Collection, Iterator
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from loom.bus.host_directory import AnnouncedHost, HostKey
from loom.schemas.auction import ANY_DOMAIN, AnnouncedNode
from loom.schemas.identity import qualified
from loom.schemas.tokens import domain_token

NodeLocation = tuple[HostKey, str]
"""A host and the id of one of its nodes."""


Group = tuple[str, bool]
"""A domain_token or a tool, and whether the nodes are plain."""
HostNodes = dict[HostKey, dict[str, AnnouncedNode]]
"""Host -> node id -> node."""


class TaskRequirements(NamedTuple):
    """The requirements of a task on a node."""

    domain_token: str
    tools: frozenset[str]
    excluded: Collection[str]
    """Qualified nodes that have failed the task."""


class AnnouncedNodes:
    """Finds announced nodes by the requirements of a task; the cost depends on the nodes of its domain only."""

    def __init__(self) -> None:
        self._hosts: dict[HostKey, tuple[AnnouncedNode, ...]] = {}
        self._nodes: dict[NodeLocation, AnnouncedNode] = {}
        self._by_domain: dict[Group, HostNodes] = {}
        """(domain_token or `*`, whether plain) -> nodes that announce it."""
        self._by_tool: dict[Group, HostNodes] = {}
        """(tool, whether plain) -> nodes that have it."""
        self._wordings: dict[str, Counter[str]] = {}
        """domain_token -> the domain as wording -> nodes that word it so and take it."""
        self._announcement_counts: dict[HostKey, int] = {}
        self.size = 0
        """Number of nodes, domain names and tool names in the index."""

    def update(self, host: AnnouncedHost) -> bool:
        """Replace the nodes of a host by those of its announcement; return whether they have changed."""
        key, known = host.key, self._hosts.get(host.key)
        self._announcement_counts[key] = self._announcement_counts.get(key, 0) + 1
        if known is host.nodes or known == host.nodes:
            return False
        self._remove(key)
        self._hosts[key] = host.nodes
        for node_id, node in _by_id(host.nodes).items():
            self._add((key, node_id), node)
        return True

    def remove_host(self, host: HostKey) -> None:
        """Remove a host and its nodes."""
        self._announcement_counts.pop(host, None)
        self._remove(host)

    def announcement_count(self, host: HostKey) -> int | None:
        """Return how often a present host has announced itself; None for other hosts."""
        return self._announcement_counts.get(host)

    def get(self, location: NodeLocation) -> AnnouncedNode | None:
        """Return an announced node; None where the host has not announced it."""
        return self._nodes.get(location)

    def capable_nodes(
        self, requirements: TaskRequirements, *, plain: bool, except_hosts: AbstractSet[HostKey] = frozenset()
    ) -> Iterator[tuple[NodeLocation, AnnouncedNode]]:
        """Yield the nodes that accept the domain, have the tools and have not failed the task.

        Only nodes of the domain are considered, or of a required tool if fewer hosts have it.

        Args:
            plain: True: only plain nodes. False: only nodes whose hosts bid for them.
            except_hosts: Hosts whose nodes are left out.
        """
        named = self._by_domain.get((requirements.domain_token, plain), {})
        others = self._by_domain.get((ANY_DOMAIN, plain), {})
        with_tool = min((self._by_tool.get((tool, plain), {}) for tool in requirements.tools), key=len, default=None)
        groups: tuple[HostNodes, ...] = (named, others)
        if with_tool is not None and len(with_tool) < len(named) + len(others):
            groups = (with_tool,)
        for group in groups:
            for host in group.keys() - except_hosts if except_hosts else group:
                for node_id, node in group[host].items():
                    is_named = node_id in named.get(host, ())
                    if group is others and is_named:
                        continue
                    if group is with_tool and not is_named and node_id not in others.get(host, ()):
                        continue
                    if self._is_capable((host, node_id), node, requirements):
                        yield (host, node_id), node

    def _is_capable(self, location: NodeLocation, node: AnnouncedNode, requirements: TaskRequirements) -> bool:
        host, node_id = location
        return (
            (not requirements.tools or requirements.tools.issubset(node.tools))
            and qualified(host.owner, node_id) not in requirements.excluded
            and node.self_rating(requirements.domain_token) > 0
        )

    # -- domains

    def has_domain(self, token: str) -> bool:
        """Return whether any node announces a domain with a self-rating above 0."""
        return token in self._wordings

    def domains(self) -> Iterator[str]:
        """Yield the announced domains, each in its most common spelling."""
        for wordings in self._wordings.values():
            yield wordings.most_common(1)[0][0]

    # -- the index

    def _add(self, location: NodeLocation, node: AnnouncedNode) -> None:
        self._nodes[location] = node
        self.size += _size(node)
        for tool in node.tools:
            _add_to(self._by_tool, (tool, node.plain), location, node)
        for token, wording in _tokens(node):
            _add_to(self._by_domain, (token, node.plain), location, node)
            if wording:
                self._wordings.setdefault(token, Counter())[wording] += 1

    def _remove(self, host: HostKey) -> None:
        for node_id, node in _by_id(self._hosts.pop(host, ())).items():
            location = (host, node_id)
            del self._nodes[location]
            self.size -= _size(node)
            for tool in node.tools:
                _remove_from(self._by_tool, (tool, node.plain), location)
            for token, wording in _tokens(node):
                _remove_from(self._by_domain, (token, node.plain), location)
                if wording:
                    self._remove_wording(token, wording)

    def _remove_wording(self, token: str, wording: str) -> None:
        wordings = self._wordings[token]
        wordings[wording] -= 1
        if not wordings[wording]:
            del wordings[wording]
        if not wordings:
            del self._wordings[token]


def _add_to(index: dict[Group, HostNodes], group: Group, location: NodeLocation, node: AnnouncedNode) -> None:
    host, node_id = location
    index.setdefault(group, {}).setdefault(host, {})[node_id] = node


def _remove_from(index: dict[Group, HostNodes], group: Group, location: NodeLocation) -> None:
    """Remove a node from a group; a name may be repeated in its announcement."""
    (host, node_id), hosts = location, index.get(group, {})
    nodes = hosts.get(host, {})
    nodes.pop(node_id, None)
    if not nodes:
        hosts.pop(host, None)
    if not hosts:
        index.pop(group, None)


def _by_id(nodes: tuple[AnnouncedNode, ...]) -> dict[str, AnnouncedNode]:
    """Return node id -> node; for a repeated id, the last node."""
    return {node.node_id: node for node in nodes}


def _tokens(node: AnnouncedNode) -> list[tuple[str, str]]:
    """Return (domain_token, spelling) for each domain of a node, each token once.

    The spelling is empty for `*` and for a self-rating of 0.
    """
    if node.domains is None:
        return [(ANY_DOMAIN, "")]
    spellings: dict[str, str] = {}
    for named in node.domains:
        if named.domain == ANY_DOMAIN:
            spellings.setdefault(ANY_DOMAIN, "")
        else:
            spellings.setdefault(domain_token(named.domain), "" if named.self_rating == 0 else named.domain)
    return list(spellings.items())


def _size(node: AnnouncedNode) -> int:
    return 1 + len(node.domains or ()) + len(node.tools)
