"""Partial decoders for profiles and records: fields that awards do not need are skipped."""

from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from loom.schemas.base import Count, Name, Timestamp, Unit, decode
from loom.schemas.identity import LOCAL_OWNER, node_key, qualified
from loom.schemas.learning.profile import MAX_DOMAINS, WINDOW, DomainEvidence, NodeProfile, Score
from loom.schemas.record import ENDED
from loom.schemas.tokens import Token


class PartialRecord(msgspec.Struct, frozen=True):
    """The part of a TaskRecord that decides whether a waiting task goes on."""

    state: str

    @property
    def ended(self) -> bool:
        """Whether the state is terminal."""
        return self.state in ENDED


class PartialEvidence(msgspec.Struct, frozen=True):
    """A DomainEvidence whose scores are decoded only after a change."""

    scores: msgspec.Raw = msgspec.Raw(b"[]")
    count: Count = 0
    mean: Unit = 0.0


class PartialProfile(msgspec.Struct, frozen=True):
    """The part of a NodeProfile that awards depend on."""

    node_id: Token
    owner: Token = LOCAL_OWNER
    last_seq: Count = 0
    domains: Annotated[dict[Name, PartialEvidence], Meta(max_length=MAX_DOMAINS)] = {}

    @property
    def key(self) -> str:
        """The key in the bucket."""
        return node_key(self.owner, self.node_id)

    @property
    def node(self) -> str:
        """The node, qualified by its owner."""
        return qualified(self.owner, self.node_id)


class PartialScore(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The first fields of a Score."""

    attempt_id: Name
    score: Unit
    ended_at: Timestamp


_Scores = Annotated[tuple[PartialScore, ...], Meta(max_length=WINDOW)]


def decode_scores(evidence: PartialEvidence) -> tuple[PartialScore, ...]:
    """Return the scores of a domain, oldest first.

    Raises:
        Undecodable: The field is not a list of scores.
    """
    scores: tuple[PartialScore, ...] = decode(bytes(evidence.scores), _Scores)
    return scores


def to_profile(
    read: PartialProfile, scores_by_domain: Mapping[str, tuple[PartialScore, ...]], before: NodeProfile | None
) -> NodeProfile:
    """Return the profile with only the newest score of each domain, which is all that awards need.

    Args:
        scores_by_domain: domain_token -> scores, for the domains that have changed.
        before: The previous profile, which supplies the other domains.
    """
    domains = before.domains if before else {}
    return NodeProfile(
        node_id=read.node_id,
        owner=read.owner,
        last_seq=read.last_seq,
        domains={
            domain_token: _newest(evidence, scores_by_domain[domain_token])
            if domain_token in scores_by_domain
            else domains[domain_token]
            for domain_token, evidence in read.domains.items()
        },
    )


def _newest(evidence: PartialEvidence, scores: tuple[PartialScore, ...]) -> DomainEvidence:
    last = tuple(Score(attempt_id=s.attempt_id, score=s.score, ended_at=s.ended_at) for s in scores[-1:])
    return DomainEvidence(scores=last, count=evidence.count, mean=evidence.mean)
