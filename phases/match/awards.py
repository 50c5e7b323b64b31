"""What this replica has awarded lately: neither bids nor rewards can tell of it yet."""

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence

from loom.phases.match.policy import taken_s
from loom.schemas.auction import Offer
from loom.schemas.envelope import Award, Envelope
from loom.schemas.learning import NodeProfile

UNJUDGED_S = 60.0
"""An award without a reward for so long is forgotten: not every attempt earns one."""


class Awards:
    """Remembers awards for as long as they are news."""

    def __init__(self) -> None:
        self._taken: deque[tuple[float, tuple[str, str]]] = deque()
        self._unjudged: dict[tuple[str, str], dict[str, float]] = {}
        """(node id, slug) -> attempt to be judged -> when it was awarded."""

    def note(self, envelope: Envelope, award: Award, offers: Sequence[Offer]) -> None:
        """Remember an award that was made on these offers."""
        now = time.monotonic()
        won = next(b for o in offers if o.host_id == award.host_id for b in o.bids if b.node_id == award.node_id)
        self._taken.append((now + taken_s(won), (award.host_id, award.node_id)))
        attempt_id = f"{envelope.task_id}:{envelope.attempt}"
        self._unjudged.setdefault((award.node_id, envelope.slug), {})[attempt_id] = now

    def judged(self, profile: NodeProfile) -> None:
        """Forget the awards of whose rewards this profile tells."""
        for slug, evidence in profile.domains.items():
            unjudged = self._unjudged.get((profile.node_id, slug))
            if unjudged is None:
                continue
            for score in evidence.scores:
                unjudged.pop(score.attempt_id, None)
            if not unjudged:
                del self._unjudged[profile.node_id, slug]

    def taken(self) -> Mapping[tuple[str, str], int]:
        """Return (host id, node id) -> awards of a moment ago."""
        now = time.monotonic()
        self._taken = deque(entry for entry in self._taken if entry[0] > now)
        return Counter(place for _, place in self._taken)

    def pending(self) -> Mapping[tuple[str, str], int]:
        """Return (node id, slug) -> awards not judged yet."""
        since = time.monotonic() - UNJUDGED_S
        for unjudged in self._unjudged.values():
            while unjudged and next(iter(unjudged.values())) < since:
                del unjudged[next(iter(unjudged))]
        return {place: len(unjudged) for place, unjudged in self._unjudged.items() if unjudged}
