"""Profiles of nodes: the evidence that rewards have added up to."""

from typing import Annotated

from msgspec import Meta, Struct

from loom.schemas.base import CheckedMessage, Count, Name, Seconds, Timestamp, Unit
from loom.schemas.identity import LOCAL_OWNER, node_key, qualified
from loom.schemas.tokens import Token

WINDOW = 120
"""Most scores per node and domain: the newest."""
PROFILE_KEYS = "*.*"
"""Filter of the keys of profiles in the bucket `nodes`."""


class Score(Struct, frozen=True, kw_only=True, array_like=True, omit_defaults=True, gc=False):
    """One entry of a window: an attempt with the scores of all its sources.

    It is not validated: its numbers come from a validated Reward, and hundreds are decoded at once.
    """

    attempt_id: Name
    """`task:attempt`; for inherited evidence `inherit:` and the name of the other node."""
    score: Unit
    """Weighted mean of the latest score of each source."""
    ended_at: Timestamp
    by_source: Annotated[dict[Name, Unit], Meta(max_length=64)] = {}
    """source -> its latest score, rounded to four decimals; empty: only the rules have judged. A source whose name has
    more than eight characters is represented by a digest."""


class DomainEvidence(CheckedMessage, frozen=True, kw_only=True):
    """Evidence about one node in one domain. Count and mean are those of the window."""

    scores: Annotated[tuple[Score, ...], Meta(max_length=WINDOW)] = ()
    """Ordered by the end of the attempt, oldest first."""
    count: Count = 0
    mean: Unit = 0.0
    since: Timestamp = 0.0
    """Attempts that ended earlier are dropped: the window was full, or the node changed."""
    losses: Count | None = None
    """Number of scores below .5 in the window; absent in a profile of an earlier version."""
    untested: Count = 0
    """Rewards since the last one whose change test considered all splits."""


MAX_DOMAINS = 24
"""Most domains of a profile: with full windows it still fits a message."""


class NodeProfile(CheckedMessage, frozen=True, kw_only=True):
    """All evidence about one node."""

    node_id: Token
    owner: Token = LOCAL_OWNER
    """Owner of the node."""
    last_seq: Count = 0
    """Sequence in REWARDS of the last reward folded."""
    domains: Annotated[dict[Name, DomainEvidence], Meta(max_length=MAX_DOMAINS)] = {}
    """domain_token -> evidence."""
    total_tasks: Count = 0
    success_rate: Unit = 0.0
    """Share of scores of at least .5 in the windows."""
    consecutive_losses: Count = 0
    tokens: Count = 0
    """Total; at most the greatest integer of a message."""
    seconds: Seconds = 0.0
    """Total; at most 1e9."""
    updated_at: Timestamp = 0.0

    @property
    def key(self) -> str:
        """Key of the stored profile."""
        return node_key(self.owner, self.node_id)

    @property
    def name(self) -> str:
        """The node as people write it."""
        return qualified(self.owner, self.node_id)
