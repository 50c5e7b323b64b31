"""An index of the nodes that present hosts have announced, by domain."""

from collections import Counter
from collections.abc import Collection, Iterator
from typing import NamedTuple

from loom.bus.host_directory import AnnouncedHost, HostKey
from loom.schemas.auction import ANY_DOMAIN, AnnouncedNode
from loom.schemas.identity import qualified
from loom.schemas.tokens import domain_token

NodeLocation = tuple[HostKey, str]
"""A host and the id of one of its nodes."""


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
        self._by_domain: dict[tuple[str, bool], dict[NodeLocation, AnnouncedNode]] = {}
        """(domain_token or `*`, whether plain) -> nodes that announce it."""
        self._wordings: dict[str, Counter[str]] = {}
        """domain_token -> the domain as wording -> nodes that word it so and take it."""
        self._announcement_counts: dict[HostKey, int] = {}
        self.size = 0
        """Number of nodes, domain names and tool names in the index."""

    def update(self, host: AnnouncedHost) -> None:
        """Replace the nodes of a host by those of its announcement."""
        key = host.key
        self._announcement_counts[key] = self._announcement_counts.get(key, 0) + 1
        if self._hosts.get(key) != host.nodes:
            self._remove(key)
            self._hosts[key] = host.nodes
            for node_id, node in _by_id(host.nodes).items():
                self._add((key, node_id), node)

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
        self, requirements: TaskRequirements, *, plain: bool
    ) -> Iterator[tuple[NodeLocation, AnnouncedNode]]:
        """Yield the nodes that accept the domain, have the tools and have not failed the task.

        Args:
            plain: True: only plain nodes. False: only nodes whose hosts bid for them.
        """
        named = self._by_domain.get((requirements.domain_token, plain), {})
        for location, node in named.items():
            if self._is_capable(location, node, requirements):
                yield location, node
        for location, node in self._by_domain.get((ANY_DOMAIN, plain), {}).items():
            if location not in named and self._is_capable(location, node, requirements):
                yield location, node

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
        for token, wording in _tokens(node):
            self._by_domain.setdefault((token, node.plain), {})[location] = node
            if wording:
                self._wordings.setdefault(token, Counter())[wording] += 1

    def _remove(self, host: HostKey) -> None:
        for node_id, node in _by_id(self._hosts.pop(host, ())).items():
            location = (host, node_id)
            del self._nodes[location]
            self.size -= _size(node)
            for token, wording in _tokens(node):
                self._remove_from_index((token, node.plain), location, wording)

    def _remove_from_index(self, domain: tuple[str, bool], location: NodeLocation, wording: str) -> None:
        token, _ = domain
        nodes = self._by_domain[domain]
        nodes.pop(location, None)
        if not nodes:
            del self._by_domain[domain]
        if wording:
            wordings = self._wordings[token]
            wordings[wording] -= 1
            if not wordings[wording]:
                del wordings[wording]
            if not wordings:
                del self._wordings[token]


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
