"""Newcomers of one owner share one newcomer's chance: many names are no advantage. Pure.

A node is a newcomer in a domain while it has no reward there, or a mean reward below 0.5: a name that has failed is as
cheap as one without evidence. Newcomers of the owner `local` share nothing: a single user needs no such protection.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from loom.schemas.envelope import Envelope
from loom.schemas.identity import LOCAL_OWNER, split_qualified
from loom.schemas.learning import DomainEvidence

PROVEN = 0.5
"""Mean reward from which a node stands for itself: it succeeds more often than not."""

Group = tuple[str, str]
"""Owner and domain_token."""


class Shared(NamedTuple):
    """What the newcomers of one owner have done together in a domain."""

    attempts: float = 0.0
    """Those that have been judged; old ones count less."""
    mean: float = 0.0
    """Mean reward of these; 0 without any."""
    pending: int = 0
    """Those that were awarded lately and have not been judged."""
    judged: int = 0
    """Those that have been judged, old ones in full."""


class Newcomers:
    """The newcomers that have been judged, by owner and domain, kept as evidence comes."""

    def __init__(self) -> None:
        self._groups: dict[Group, dict[str, DomainEvidence]] = {}
        """Owner and domain -> node, qualified by its owner -> its evidence."""
        self._domains: dict[str, frozenset[str]] = {}
        """Node, qualified by its owner -> the domains in which it is a newcomer that has been judged."""

    def learn(self, node: str, domains: Mapping[str, DomainEvidence]) -> None:
        """Replace all that is known of a node.

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

    def of(self, owner: str, domain_token: str) -> Mapping[str, DomainEvidence]:
        """Return node -> evidence of an owner's newcomers that have been judged in a domain."""
        return self._groups.get((owner, domain_token), {})


def is_newcomer(owner: str, evidence: DomainEvidence) -> bool:
    """Return whether a node with that evidence in a domain is one of the newcomers who share."""
    return owner != LOCAL_OWNER and (not evidence.count or evidence.mean < PROVEN)


def shared_by(known: Mapping[str, DomainEvidence], pending: int, weight: Callable[[DomainEvidence], float]) -> Shared:
    """Return what an owner's newcomers have done together.

    Args:
        known: Node -> evidence, of those that have been judged.
        pending: Attempts of all of them that have not been judged.
        weight: Returns how much of an evidence still counts, 0 to 1.
    """
    weighed = [(evidence.count * weight(evidence), evidence) for evidence in known.values()]
    count = sum(each for each, _ in weighed)
    mean = sum(each * evidence.mean for each, evidence in weighed) / count if count else 0.0
    return Shared(count, mean, pending, sum(evidence.count for evidence in known.values()))


def failing_owners(envelope: Envelope, evidence_of: Callable[[str], DomainEvidence]) -> frozenset[str]:
    """Return the owners of newcomers that have failed the task: their other newcomers come after all other bidders.

    Args:
        evidence_of: Returns the evidence of a node, qualified by its owner, in the task's domain.
    """
    return frozenset(
        failed.owner
        for failed in envelope.failed_attempts
        if failed.owner != LOCAL_OWNER and is_newcomer(failed.owner, evidence_of(failed.node))
    )
