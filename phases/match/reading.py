"""What MATCH reads of offers, profiles and records: what no award needs is passed over; nothing is checked twice."""

from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from loom.schemas.auction import Bid, Offer
from loom.schemas.envelope import ENDED
from loom.schemas.learning import WINDOW, DomainEvidence, NodeProfile, Score
from loom.schemas.wire import Count, Token, Unit, decode


class ReadBid(Bid, frozen=True, kw_only=True):
    """A bid as it came."""

    def __post_init__(self) -> None:
        """Check nothing: decoding has checked every range, and JSON has no number that is not finite."""


class ReadOffer(Offer, frozen=True, kw_only=True):
    """An offer as it came."""

    bids: tuple[ReadBid, ...] = ()

    def __post_init__(self) -> None:
        """Check nothing, as with a bid."""


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
    last_seq: Count = 0
    domains: dict[str, ReadEvidence] = {}


class Judged(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The first fields of a Score."""

    attempt_id: str
    score: Unit
    ended_at: float


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
        windows: slug -> scores, of the domains that have changed.
        before: Where the others are.
    """
    domains = before.domains if before else {}
    return NodeProfile(
        node_id=read.node_id,
        last_seq=read.last_seq,
        domains={
            slug: _newest(evidence, windows[slug]) if slug in windows else domains[slug]
            for slug, evidence in read.domains.items()
        },
    )


def _newest(evidence: ReadEvidence, scores: tuple[Judged, ...]) -> DomainEvidence:
    last = tuple(Score(attempt_id=one.attempt_id, score=one.score, ended_at=one.ended_at) for one in scores[-1:])
    return DomainEvidence(scores=last, count=evidence.count, mean=evidence.mean)
