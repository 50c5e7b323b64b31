"""What a host answers about a domain that none of its nodes names: the nearest one they do name."""

import time
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from loom.agents.node import Node
from loom.schemas.auction import CallForBids, Offer
from loom.schemas.near import nearest_domain
from loom.schemas.task import slug
from loom.schemas.wire import cut_name

FRESH_S = 3.0
"""How long a nearest domain is kept: nodes come and go."""
MOST_KEPT = 256


class DomainHints:
    """Completes offers to calls in domains that no node of the host names.

    Args:
        clock: Returns seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: dict[str, tuple[float, str]] = {}
        """Slug -> when its nearest domain was found, and that domain; empty: there is none."""

    def completed(self, offer: Offer, call: CallForBids, nodes: Sequence[Node]) -> Offer:
        """Return the offer, with a hint where no node names the domain of the call."""
        if any(slug(name) == call.slug for node in nodes for name in node.named_domains()):
            return offer
        return replace(offer, unrated=True, near=self._near(call, nodes))

    def _near(self, call: CallForBids, nodes: Sequence[Node]) -> str:
        now = self._clock()
        at, near = self._kept.get(call.slug, (-FRESH_S, ""))
        if now - at < FRESH_S:
            return near
        if len(self._kept) >= MOST_KEPT:
            self._kept.clear()
        names = (name for node in nodes if node.agent is not None for name in node.named_domains())
        near = cut_name(nearest_domain(call.domain or call.slug, names) or "")
        self._kept[call.slug] = now, near
        return near
