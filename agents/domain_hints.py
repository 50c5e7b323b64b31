"""What a host answers about a domain that none of its nodes names: the nearest one they do name."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from loom.agents.node import Node
from loom.schemas.auction import CallForBids, Offer
from loom.schemas.near import nearest_domain
from loom.schemas.task import domain_token
from loom.schemas.wire import cut_name

FRESH_S = 3.0
"""How long what was found for a domain is kept, while the host has as many nodes: an auction costs no search."""
MOST_KEPT = 256


class Hint(NamedTuple):
    """What was found for a domain."""

    at: float
    nodes: int
    """Nodes of the host at that time."""
    unrated: bool
    near: str


class DomainHints:
    """Completes offers to calls in domains that no node of the host names.

    Args:
        clock: Returns seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: dict[str, Hint] = {}
        """Slug -> what was found for it."""

    def completed(self, offer: Offer, call: CallForBids, nodes: Sequence[Node]) -> Offer:
        """Return the offer, with a hint where no node names the domain of the call."""
        now = self._clock()
        hint = self._kept.get(call.domain_token)
        if hint is None or now - hint.at >= FRESH_S or hint.nodes != len(nodes):
            hint = Hint(now, len(nodes), *_search(call, nodes))
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            self._kept[call.domain_token] = hint
        return replace(offer, unrated=True, near=hint.near) if hint.unrated else offer


def _search(call: CallForBids, nodes: Sequence[Node]) -> tuple[bool, str]:
    """Return whether no node names the domain of a call, and the nearest one that a node names."""
    if any(domain_token(name) == call.domain_token for node in nodes for name in node.named_domains()):
        return False, ""
    names = (name for node in nodes if node.agent is not None for name in node.named_domains())
    return True, cut_name(nearest_domain(call.domain or call.domain_token, names) or "")
