"""What MATCH reads of stored values: the state of a record, and the summary of a profile."""

from collections.abc import Collection

import msgspec

from loom.schemas.learning.profile import DomainEvidence, NodeProfile, Score
from loom.schemas.learning.summary import DomainSummary, ProfileSummary
from loom.schemas.record import ENDED


class PartialRecord(msgspec.Struct, frozen=True):
    """The part of a TaskRecord that decides whether a waiting task goes on."""

    state: str

    @property
    def ended(self) -> bool:
        """Whether the state is terminal."""
        return self.state in ENDED


def to_profile(summary: ProfileSummary, changed: Collection[str], before: NodeProfile | None) -> NodeProfile:
    """Return the profile of a summary; its windows have one entry, which stands for the newest score.

    Args:
        summary: The summary of the node.
        changed: The domain_tokens whose summaries have changed.
        before: The previous profile, which supplies the other domains.
    """
    return NodeProfile(
        node_id=summary.node_id,
        owner=summary.owner,
        last_seq=summary.last_seq,
        domains={
            token: _to_evidence(domain) if before is None or token in changed else before.domains[token]
            for token, domain in summary.domains.items()
        },
    )


def _to_evidence(domain: DomainSummary) -> DomainEvidence:
    newest = (Score(attempt_id="", score=domain.mean, ended_at=domain.newest_at),) if domain.newest_at else ()
    return DomainEvidence(scores=newest, count=domain.count, mean=domain.mean, losses=domain.losses)
