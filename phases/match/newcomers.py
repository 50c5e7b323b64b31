"""Newcomers of one owner share the chance of one newcomer, so that many node names give no advantage. Pure.

A node is a newcomer in a domain while it has no reward there, or a mean reward below 0.5: a name with failures is as
cheap as a new one. Newcomers of the owner `local` share nothing, because a single user needs no such protection.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from loom.schemas.envelope import Envelope
from loom.schemas.identity import LOCAL_OWNER, split_qualified
from loom.schemas.learning.profile import DomainEvidence

PROVEN_MEAN = 0.5
"""Mean reward from which a node is not a newcomer: it succeeds more often than it fails."""

WEIGHED_FOR_S = 10.0
"""Seconds for which the weight of unchanged evidence is used again."""

OwnerDomain = tuple[str, str]
"""Owner and domain_token."""


class SharedEvidence(NamedTuple):
    """The joint record of one owner's newcomers in a domain."""

    attempts: float = 0.0
    """Number of rewarded attempts; old ones count less than 1."""
    mean: float = 0.0
    """Mean reward of these attempts, 0 to 1; 0 without attempts."""
    pending: int = 0
    """Number of recent awards without a reward."""
    rewarded: int = 0
    """Number of rewarded attempts; old ones count in full."""


class _Group:
    """The newcomers of one owner with rewards in a domain, and running totals of their evidence.

    An auction pays for the newcomers whose evidence has changed since the last one. All are weighed again after ten
    seconds, in which evidence fades by nearly nothing.
    """

    def __init__(self) -> None:
        self.evidence: dict[str, DomainEvidence] = {}
        """Qualified node -> evidence."""
        self._shares: dict[str, tuple[float, float, int]] = {}
        """Node -> its part of the totals: weighted attempts, their summed rewards, and attempts."""
        self._changed: dict[str, None] = {}
        """Nodes in the order of their changes: the sums are the same in each process."""
        self._weighed_at = math.inf
        self._attempts, self._rewards, self._rewarded = 0.0, 0.0, 0

    def replace(self, node: str, evidence: DomainEvidence | None) -> None:
        """Replace the evidence of a node; None removes it."""
        if evidence is None:
            del self.evidence[node]
        else:
            self.evidence[node] = evidence
        self._changed[node] = None

    def shared_evidence(self, pending: int, weight: Callable[[DomainEvidence], float], now: float) -> SharedEvidence:
        """Return the joint record; see `Newcomers.shared_evidence`."""
        if not self._weighed_at <= now < self._weighed_at + WEIGHED_FOR_S:
            self._weighed_at = now
            self._shares.clear()
            self._changed = dict.fromkeys(self.evidence)
            self._attempts, self._rewards, self._rewarded = 0.0, 0.0, 0
        for node in self._changed:
            self._weigh(node, weight)
        self._changed.clear()
        mean = min(1.0, max(0.0, self._rewards / self._attempts)) if self._attempts > 0 else 0.0
        return SharedEvidence(max(0.0, self._attempts), mean, pending, self._rewarded)

    def _weigh(self, node: str, weight: Callable[[DomainEvidence], float]) -> None:
        before, evidence = self._shares.pop(node, (0.0, 0.0, 0)), self.evidence.get(node)
        share = (0.0, 0.0, 0)
        if evidence is not None:
            attempts = evidence.count * weight(evidence)
            share = self._shares[node] = (attempts, attempts * evidence.mean, evidence.count)
        self._attempts += share[0] - before[0]
        self._rewards += share[1] - before[1]
        self._rewarded += share[2] - before[2]


class Newcomers:
    """The newcomers with rewards, by owner and domain; updated with every change of a profile."""

    def __init__(self) -> None:
        self._groups: dict[OwnerDomain, _Group] = {}
        self._domains: dict[str, frozenset[str]] = {}
        """Qualified node -> domain_tokens in which it is a newcomer with rewards."""

    def update(self, node: str, domains: Mapping[str, DomainEvidence]) -> None:
        """Replace the evidence of a node.

        Args:
            node: Qualified by its owner.
            domains: domain_token -> evidence.
        """
        owner, _ = split_qualified(node)
        if owner == LOCAL_OWNER:
            return
        now = frozenset(token for token, evidence in domains.items() if evidence.count and is_newcomer(owner, evidence))
        for token in self._domains.pop(node, frozenset()) - now:
            group = self._groups[owner, token]
            group.replace(node, None)
            if not group.evidence:
                del self._groups[owner, token]
        for token in now:
            self._groups.setdefault((owner, token), _Group()).replace(node, domains[token])
        if now:
            self._domains[node] = now

    def shared_evidence(
        self,
        owner: str,
        domain_token: str,
        pending: int,
        weight: Callable[[DomainEvidence], float],
        now: float,
    ) -> SharedEvidence:
        """Return the joint record of an owner's newcomers in a domain.

        Args:
            owner: An owner other than `local`.
            domain_token: Token of the domain.
            pending: Number of their recent awards without a reward.
            weight: Returns the weight of an evidence at the time `now`, 0 to 1.
            now: Server time, in seconds.
        """
        group = self._groups.get((owner, domain_token))
        return SharedEvidence(pending=pending) if group is None else group.shared_evidence(pending, weight, now)


def is_newcomer(owner: str, evidence: DomainEvidence) -> bool:
    """Return whether a node with this evidence in a domain shares with the other newcomers of its owner."""
    return owner != LOCAL_OWNER and (not evidence.count or evidence.mean < PROVEN_MEAN)


def owners_with_failed_newcomers(envelope: Envelope, evidence_of: Callable[[str], DomainEvidence]) -> frozenset[str]:
    """Return the owners with newcomers that have failed the task: their other newcomers rank behind all other bidders.

    Args:
        evidence_of: Returns the evidence of a qualified node in the task's domain.
    """
    return frozenset(
        failed.owner
        for failed in envelope.failed_attempts
        if failed.owner != LOCAL_OWNER and is_newcomer(failed.owner, evidence_of(failed.node))
    )
