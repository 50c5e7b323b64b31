"""The best known nodes of each domain, kept in order as evidence comes: a call for bids asks for them every time."""

from bisect import bisect_left, insort
from collections.abc import Mapping


class Ranking:
    """Nodes by mean reward, per domain."""

    def __init__(self) -> None:
        self._means: dict[str, dict[str, float]] = {}
        """node id -> slug -> mean, as in the order."""
        self._order: dict[str, list[tuple[float, str]]] = {}
        """slug -> (-mean, node id), best first."""

    def learn(self, node_id: str, means: Mapping[str, float]) -> None:
        """Replace all that is known of a node; `means` by slug."""
        before = self._means.get(node_id, {})
        for slug in before.keys() | means.keys():
            if before.get(slug) != means.get(slug):
                self._move(node_id, slug, before.get(slug), means.get(slug))
        self._means[node_id] = dict(means)

    def best(self, slug: str, limit: int) -> tuple[str, ...]:
        """Return the nodes with the best evidence in a domain, best first, equals by name."""
        return tuple(node for _, node in self._order.get(slug, [])[:limit])

    def _move(self, node_id: str, slug: str, before: float | None, after: float | None) -> None:
        order = self._order.setdefault(slug, [])
        if before is not None:
            del order[bisect_left(order, (-before, node_id))]
        if after is not None:
            insort(order, (-after, node_id))
        if not order:
            del self._order[slug]
