"""What this replica has awarded lately: neither bids nor rewards can tell of it yet."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from heapq import heappop, heappush

from loom.phases.match.scoring import Awarded, taken_s
from loom.schemas.envelope import Envelope

UNJUDGED_S = 60.0
"""An award without a reward for so long is forgotten: not every attempt earns one."""
SWEEP_S = 1.0
"""How often those are looked for."""

Place = tuple[str, str, str]
"""Owner, host id and node id."""
Domain = tuple[str, str]
"""Node, qualified by its owner, and domain_token."""


class RecentAwards:
    """Remembers awards for as long as they are news; what it returns is its own, and changes with it."""

    def __init__(self) -> None:
        self._ends: list[tuple[float, Place]] = []
        """A heap: until when an award is held against its place."""
        self._taken: Counter[Place] = Counter()
        self._unjudged: dict[Domain, dict[str, float]] = {}
        """Node and domain -> attempt to be judged -> when it was awarded."""
        self._pending: dict[Domain, int] = {}
        self._swept = -math.inf

    def note(self, envelope: Envelope, domain_token: str, awarded: Awarded) -> None:
        """Remember an award in a domain."""
        now = time.monotonic()
        award = awarded.award
        if not award.plain:  # its load is counted until it is judged
            taken = (award.owner, award.host_id, award.node_id)
            heappush(self._ends, (now + taken_s(awarded.bid), taken))
            self._taken[taken] += 1
        judged = (award.node, domain_token)
        unjudged = self._unjudged.setdefault(judged, {})
        unjudged[f"{envelope.task_id}:{envelope.attempt}"] = now
        self._pending[judged] = len(unjudged)

    def judged(self, node: str, domain_token: str, attempt_ids: Iterable[str]) -> None:
        """Forget the awards that have been rewarded."""
        unjudged = self._unjudged.get((node, domain_token))
        if unjudged is None:
            return
        for attempt_id in attempt_ids:
            unjudged.pop(attempt_id, None)
        self._count((node, domain_token), unjudged)

    def taken(self) -> Mapping[Place, int]:
        """Return (owner, host id, node id) -> awards of a moment ago."""
        now = time.monotonic()
        while self._ends and self._ends[0][0] <= now:
            _, place = heappop(self._ends)
            self._taken[place] -= 1
            if not self._taken[place]:
                del self._taken[place]
        return self._taken

    def pending(self) -> Mapping[Domain, int]:
        """Return (node, domain_token) -> awards not judged yet, the nodes qualified by their owners."""
        now = time.monotonic()
        if now >= self._swept + SWEEP_S:
            self._swept = now
            for place, unjudged in list(self._unjudged.items()):
                while unjudged and next(iter(unjudged.values())) < now - UNJUDGED_S:
                    del unjudged[next(iter(unjudged))]
                self._count(place, unjudged)
        return self._pending

    def _count(self, place: Domain, unjudged: Mapping[str, float]) -> None:
        if unjudged:
            self._pending[place] = len(unjudged)
        else:
            del self._unjudged[place], self._pending[place]
