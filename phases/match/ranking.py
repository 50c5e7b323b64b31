"""The best known nodes of each domain, kept in order as evidence comes: a call for bids asks for them every time."""

from bisect import bisect_left, insort
from collections.abc import Mapping


class Ranking:
    """Nodes, qualified by their owners, by mean reward, per domain."""

    def __init__(self) -> None:
        self._means: dict[str, dict[str, float]] = {}
        """Node -> domain_token -> mean, as in the order."""
        self._order: dict[str, list[tuple[float, str]]] = {}
        """domain_token -> (-mean, node), best first."""

    def learn(self, node: str, means: Mapping[str, float]) -> None:
        """Replace all that is known of a node; `means` by domain_token."""
        before = self._means.get(node, {})
        for domain_token in before.keys() | means.keys():
            if before.get(domain_token) != means.get(domain_token):
                self._move(node, domain_token, before.get(domain_token), means.get(domain_token))
        self._means[node] = dict(means)

    def best(self, domain_token: str, limit: int) -> tuple[str, ...]:
        """Return the nodes with the best evidence in a domain, best first, equals by name."""
        return tuple(node for _, node in self._order.get(domain_token, [])[:limit])

    def _move(self, node: str, domain_token: str, before: float | None, after: float | None) -> None:
        order = self._order.setdefault(domain_token, [])
        if before is not None:
            del order[bisect_left(order, (-before, node))]
        if after is not None:
            insort(order, (-after, node))
        if not order:
            del self._order[domain_token]
