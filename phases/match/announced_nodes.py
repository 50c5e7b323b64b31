"""The nodes that the present hosts have announced, by the domains they take."""

from collections import Counter
from collections.abc import Collection, Iterator
from typing import NamedTuple

from loom.bus.host_directory import AnnouncedHost, HostKey
from loom.schemas.auction import ANY_DOMAIN, AnnouncedNode
from loom.schemas.identity import qualified
from loom.schemas.tokens import domain_token

Place = tuple[HostKey, str]
"""A host and the id of one of its nodes."""


class Wanted(NamedTuple):
    """What a task asks of a node."""

    domain_token: str
    tools: frozenset[str]
    excluded: Collection[str]
    """Nodes that have failed it, qualified by their owners."""


class AnnouncedNodes:
    """Finds announced nodes by what a task wants, in a time that depends on the nodes of its domain alone."""

    def __init__(self) -> None:
        self._hosts: dict[HostKey, tuple[AnnouncedNode, ...]] = {}
        self._nodes: dict[Place, AnnouncedNode] = {}
        self._by_domain: dict[tuple[str, bool], dict[Place, AnnouncedNode]] = {}
        """domain_token, or `*`, and whether they are plain -> the nodes that name it."""
        self._worded: dict[str, Counter[str]] = {}
        """domain_token -> the domain as worded -> nodes that word it so and take it."""
        self._announcements: dict[HostKey, int] = {}
        self.size = 0
        """Nodes, and names of domains and tools."""

    def announce(self, host: AnnouncedHost) -> None:
        """Replace the nodes of a host."""
        key = host.key
        self._announcements[key] = self._announcements.get(key, 0) + 1
        if self._hosts.get(key) != host.nodes:
            self._remove(key)
            self._hosts[key] = host.nodes
            for node_id, node in _by_id(host.nodes).items():
                self._add((key, node_id), node)

    def forget(self, host: HostKey) -> None:
        """Forget a host and its nodes."""
        self._announcements.pop(host, None)
        self._remove(host)

    def announcements(self, host: HostKey) -> int | None:
        """Return how often a present host has announced itself; None when it has gone."""
        return self._announcements.get(host)

    def get(self, place: Place) -> AnnouncedNode | None:
        """Return the node of a host, if it has announced it."""
        return self._nodes.get(place)

    def able(self, wanted: Wanted, *, plain: bool) -> Iterator[tuple[Place, AnnouncedNode]]:
        """Yield the nodes that take the domain, have the tools and have not failed the task.

        Args:
            plain: Which nodes: the plain ones, or those whose hosts bid for them.
        """
        named = self._by_domain.get((wanted.domain_token, plain), {})
        for place, node in named.items():
            if self._is_able(place, node, wanted):
                yield place, node
        for place, node in self._by_domain.get((ANY_DOMAIN, plain), {}).items():
            if place not in named and self._is_able(place, node, wanted):
                yield place, node

    def _is_able(self, place: Place, node: AnnouncedNode, wanted: Wanted) -> bool:
        host, node_id = place
        return (
            (not wanted.tools or wanted.tools.issubset(node.tools))
            and qualified(host.owner, node_id) not in wanted.excluded
            and node.self_rating(wanted.domain_token) > 0
        )

    # -- domains

    def takes(self, token: str) -> bool:
        """Return whether a node names a domain and takes it."""
        return token in self._worded

    def domains(self) -> Iterator[str]:
        """Yield the domains that nodes name and take, as most of the nodes word them."""
        for wordings in self._worded.values():
            yield wordings.most_common(1)[0][0]

    # -- the index

    def _add(self, place: Place, node: AnnouncedNode) -> None:
        self._nodes[place] = node
        self.size += _size(node)
        for token, worded in _tokens(node):
            self._by_domain.setdefault((token, node.plain), {})[place] = node
            if worded:
                self._worded.setdefault(token, Counter())[worded] += 1

    def _remove(self, host: HostKey) -> None:
        for node_id, node in _by_id(self._hosts.pop(host, ())).items():
            place = (host, node_id)
            del self._nodes[place]
            self.size -= _size(node)
            for token, worded in _tokens(node):
                self._drop((token, node.plain), place, worded)

    def _drop(self, domain: tuple[str, bool], place: Place, worded: str) -> None:
        token, _ = domain
        nodes = self._by_domain[domain]
        nodes.pop(place, None)
        if not nodes:
            del self._by_domain[domain]
        if worded:
            wordings = self._worded[token]
            wordings[worded] -= 1
            if not wordings[worded]:
                del wordings[worded]
            if not wordings:
                del self._worded[token]


def _by_id(nodes: tuple[AnnouncedNode, ...]) -> dict[str, AnnouncedNode]:
    """The nodes by their ids; of those that share one, the last counts."""
    return {node.node_id: node for node in nodes}


def _tokens(node: AnnouncedNode) -> list[tuple[str, str]]:
    """The tokens under which a node is found, each once, with the wording of a domain that it takes."""
    if node.domains is None:
        return [(ANY_DOMAIN, "")]
    found: dict[str, str] = {}
    for named in node.domains:
        if named.domain == ANY_DOMAIN:
            found.setdefault(ANY_DOMAIN, "")
        else:
            found.setdefault(domain_token(named.domain), "" if named.self_rating == 0 else named.domain)
    return list(found.items())


def _size(node: AnnouncedNode) -> int:
    return 1 + len(node.domains or ()) + len(node.tools)
