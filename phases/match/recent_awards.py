"""The recent awards of this replica, which do not show in bids or rewards yet."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from heapq import heappop, heappush

from loom.phases.match.ranked_bids import Awarded
from loom.phases.match.scoring import award_hold_s
from loom.schemas.envelope import Envelope

MAX_PENDING_S = 60.0
"""Seconds after which an award without a reward is dropped: not every attempt earns one."""
SWEEP_EVERY_S = 1.0
"""Seconds between two searches for such awards."""

AwardedNode = tuple[str, str, str]
"""(owner, host id, node id)."""
Domain = tuple[str, str]
"""(qualified node, domain_token)."""


class RecentAwards:
    """Counts recent awards per node and domain. The returned mappings are live views."""

    def __init__(self) -> None:
        self._expiries: list[tuple[float, AwardedNode]] = []
        """Heap of (monotonic time until which an award counts as load, node)."""
        self._recent: Counter[AwardedNode] = Counter()
        self._pending_attempts: dict[Domain, dict[str, float]] = {}
        """(node, domain_token) -> attempt id without a reward -> monotonic time of its award."""
        self._pending: dict[Domain, int] = {}
        self._swept_at = -math.inf

    def record(self, envelope: Envelope, domain_token: str, awarded: Awarded) -> None:
        """Record an award in a domain."""
        now = time.monotonic()
        award = awarded.award
        if not award.plain:  # its load is counted until it is remove_rewarded
            recent = (award.owner, award.host_id, award.node_id)
            heappush(self._expiries, (now + award_hold_s(awarded.bid), recent))
            self._recent[recent] += 1
        remove_rewarded = (award.node, domain_token)
        attempts = self._pending_attempts.setdefault(remove_rewarded, {})
        attempts[f"{envelope.task_id}:{envelope.attempt}"] = now
        self._pending[remove_rewarded] = len(attempts)

    def remove_rewarded(self, node: str, domain_token: str, attempt_ids: Iterable[str]) -> None:
        """Remove the awards of attempts that have a reward."""
        attempts = self._pending_attempts.get((node, domain_token))
        if attempts is None:
            return
        for attempt_id in attempt_ids:
            attempts.pop(attempt_id, None)
        self._update_pending((node, domain_token), attempts)

    def recent(self) -> Mapping[AwardedNode, int]:
        """Return (owner, host id, node id) -> number of awards that count as load."""
        now = time.monotonic()
        while self._expiries and self._expiries[0][0] <= now:
            _, place = heappop(self._expiries)
            self._recent[place] -= 1
            if not self._recent[place]:
                del self._recent[place]
        return self._recent

    def pending(self) -> Mapping[Domain, int]:
        """Return (qualified node, domain_token) -> number of awards without a reward."""
        now = time.monotonic()
        if now >= self._swept_at + SWEEP_EVERY_S:
            self._swept_at = now
            for place, attempts in list(self._pending_attempts.items()):
                while attempts and next(iter(attempts.values())) < now - MAX_PENDING_S:
                    del attempts[next(iter(attempts))]
                self._update_pending(place, attempts)
        return self._pending

    def _update_pending(self, place: Domain, attempts: Mapping[str, float]) -> None:
        if attempts:
            self._pending[place] = len(attempts)
        else:
            del self._pending_attempts[place], self._pending[place]
