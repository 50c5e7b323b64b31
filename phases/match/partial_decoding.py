"""What MATCH reads of profiles and records: what no award needs is passed over; nothing is checked twice."""

from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from loom.schemas.base import Count, Name, Timestamp, Unit, decode
from loom.schemas.identity import LOCAL_OWNER, node_key, qualified
from loom.schemas.learning import MAX_DOMAINS, WINDOW, DomainEvidence, NodeProfile, Score
from loom.schemas.record import ENDED
from loom.schemas.tokens import Token


class ReadRecord(msgspec.Struct, frozen=True):
    """The part of a TaskRecord that decides whether a waiting task goes on."""

    state: str

    @property
    def ended(self) -> bool:
        """Whether the state is terminal."""
        return self.state in ENDED


class ReadEvidence(msgspec.Struct, frozen=True):
    """A DomainEvidence whose window is opened only if it has changed."""

    scores: msgspec.Raw = msgspec.Raw(b"[]")
    count: Count = 0
    mean: Unit = 0.0


class ReadProfile(msgspec.Struct, frozen=True):
    """The part of a NodeProfile awards rest on."""

    node_id: Token
    owner: Token = LOCAL_OWNER
    last_seq: Count = 0
    domains: Annotated[dict[Name, ReadEvidence], Meta(max_length=MAX_DOMAINS)] = {}

    @property
    def key(self) -> str:
        """The key under which it is stored."""
        return node_key(self.owner, self.node_id)

    @property
    def name(self) -> str:
        """The node, qualified by its owner."""
        return qualified(self.owner, self.node_id)


class Judged(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The first fields of a Score."""

    attempt_id: Name
    score: Unit
    ended_at: Timestamp


_Window = Annotated[tuple[Judged, ...], Meta(max_length=WINDOW)]


def window(evidence: ReadEvidence) -> tuple[Judged, ...]:
    """Return the scores of a domain, oldest first.

    Raises:
        Undecodable: They are none.
    """
    scores: tuple[Judged, ...] = decode(bytes(evidence.scores), _Window)
    return scores


def known(read: ReadProfile, windows: Mapping[str, tuple[Judged, ...]], before: NodeProfile | None) -> NodeProfile:
    """Return the profile with the newest score of each domain alone: awards ask for no other.

    Args:
        windows: domain_token -> scores, of the domains that have changed.
        before: Where the others are.
    """
    domains = before.domains if before else {}
    return NodeProfile(
        node_id=read.node_id,
        owner=read.owner,
        last_seq=read.last_seq,
        domains={
            domain_token: _newest(evidence, windows[domain_token]) if domain_token in windows else domains[domain_token]
            for domain_token, evidence in read.domains.items()
        },
    )


def _newest(evidence: ReadEvidence, scores: tuple[Judged, ...]) -> DomainEvidence:
    last = tuple(Score(attempt_id=one.attempt_id, score=one.score, ended_at=one.ended_at) for one in scores[-1:])
    return DomainEvidence(scores=last, count=evidence.count, mean=evidence.mean)
