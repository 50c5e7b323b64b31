"""Newcomers of one owner share the chance of one newcomer, so that many node names give no advantage. Pure.

A node is a newcomer in a domain while it has no reward there, or a mean reward below 0.5: a name with failures is as
cheap as a new one. Newcomers of the owner `local` share nothing, because a single user needs no such protection.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from loom.schemas.envelope import Envelope
from loom.schemas.identity import LOCAL_OWNER, split_qualified
from loom.schemas.learning.profile import DomainEvidence

PROVEN_MEAN = 0.5
"""Mean reward from which a node is not a newcomer: it succeeds more often than it fails."""

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


class Newcomers:
    """The newcomers with rewards, by owner and domain; updated with every change of a profile."""

    def __init__(self) -> None:
        self._groups: dict[OwnerDomain, dict[str, DomainEvidence]] = {}
        """(owner, domain_token) -> qualified node -> evidence."""
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
            del group[node]
            if not group:
                del self._groups[owner, token]
        for token in now:
            self._groups.setdefault((owner, token), {})[node] = domains[token]
        if now:
            self._domains[node] = now

    def evidence_of_owner(self, owner: str, domain_token: str) -> Mapping[str, DomainEvidence]:
        """Return node -> evidence for the newcomers of an owner that have rewards in a domain."""
        return self._groups.get((owner, domain_token), {})


def is_newcomer(owner: str, evidence: DomainEvidence) -> bool:
    """Return whether a node with this evidence in a domain shares with the other newcomers of its owner."""
    return owner != LOCAL_OWNER and (not evidence.count or evidence.mean < PROVEN_MEAN)


def shared_evidence(
    evidence_by_node: Mapping[str, DomainEvidence], pending: int, weight: Callable[[DomainEvidence], float]
) -> SharedEvidence:
    """Return the joint record of an owner's newcomers.

    Args:
        evidence_by_node: Node -> evidence, of the newcomers with rewards.
        pending: Number of their recent awards without a reward.
        weight: Returns the weight of an evidence, 0 to 1.
    """
    weighed = [(evidence.count * weight(evidence), evidence) for evidence in evidence_by_node.values()]
    count = sum(attempts for attempts, _ in weighed)
    mean = sum(attempts * evidence.mean for attempts, evidence in weighed) / count if count else 0.0
    return SharedEvidence(count, mean, pending, sum(evidence.count for evidence in evidence_by_node.values()))


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
