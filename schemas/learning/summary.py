"""Summaries of profiles: what an award needs to know of a node."""

from typing import Annotated

from msgspec import Meta

from loom.schemas.base import CheckedMessage, Count, Name, Timestamp, Unit
from loom.schemas.identity import LOCAL_OWNER, node_key, qualified
from loom.schemas.learning.profile import MAX_DOMAINS, WINDOW
from loom.schemas.tokens import Token

SUMMARY_KEYS = "*.*.summary"
"""Filter of the keys of summaries in the bucket `nodes`."""


def summary_key(key: str) -> str:
    """Return the key of the summary of a node.

    Args:
        key: Key of its profile.
    """
    return f"{key}.summary"


class DomainSummary(CheckedMessage, frozen=True, kw_only=True):
    """What an award needs to know of a node in one domain."""

    count: Count = 0
    mean: Unit = 0.0
    losses: Count = 0
    """Number of scores below .5."""
    newest_at: Timestamp = 0.0
    """When the attempt of the newest score ended; 0: there is none."""
    rewarded: Annotated[tuple[Name, ...], Meta(max_length=WINDOW)] = ()
    """`task:attempt` of the attempts that were rewarded last."""


class ProfileSummary(CheckedMessage, frozen=True, kw_only=True):
    """The profile of a node without its scores: the value that MATCH reads."""

    node_id: Token
    owner: Token = LOCAL_OWNER
    """Owner of the node."""
    last_seq: Count = 0
    """Sequence in REWARDS of the last reward folded."""
    domains: Annotated[dict[Name, DomainSummary], Meta(max_length=MAX_DOMAINS)] = {}
    """domain_token -> summary."""

    @property
    def node_key(self) -> str:
        """Key of the stored profile."""
        return node_key(self.owner, self.node_id)

    @property
    def key(self) -> str:
        """Key of the stored summary."""
        return summary_key(self.node_key)

    @property
    def name(self) -> str:
        """The node as people write it."""
        return qualified(self.owner, self.node_id)
