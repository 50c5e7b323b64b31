"""The nodes of each domain, sorted by mean reward; kept sorted, because every call for bids names the best."""

from bisect import bisect_left, insort
from collections.abc import Mapping


class Ranking:
    """Ranks qualified nodes by mean reward, per domain."""

    def __init__(self) -> None:
        self._means: dict[str, dict[str, float]] = {}
        """Node -> domain_token -> mean reward, as in `_order`."""
        self._order: dict[str, list[tuple[float, str]]] = {}
        """domain_token -> (-mean reward, node), best first."""

    def update(self, node: str, means: Mapping[str, float]) -> None:
        """Replace the mean rewards of a node; `means` maps domain_token to mean reward."""
        before = self._means.get(node, {})
        for domain_token in before.keys() | means.keys():
            if before.get(domain_token) != means.get(domain_token):
                self._move(node, domain_token, before.get(domain_token), means.get(domain_token))
        self._means[node] = dict(means)

    def best(self, domain_token: str, limit: int) -> tuple[str, ...]:
        """Return the nodes with the highest mean rewards in a domain, best first, ties by name."""
        return tuple(node for _, node in self._order.get(domain_token, [])[:limit])

    def _move(self, node: str, domain_token: str, before: float | None, after: float | None) -> None:
        order = self._order.setdefault(domain_token, [])
        if before is not None:
            del order[bisect_left(order, (-before, node))]
        if after is not None:
            insort(order, (-after, node))
        if not order:
            del self._order[domain_token]
