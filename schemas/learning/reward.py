"""Rewards: scores of attempts, and the snapshots stored between them."""

from typing import Annotated, Literal

from msgspec import Meta

from loom.schemas.base import CheckedMessage, Count, Seconds, Timestamp, Unit
from loom.schemas.checks.labels import Labels
from loom.schemas.identity import LOCAL_OWNER, RULES, node_key, qualified
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.task import DEFAULT_TOKEN_YARDSTICK, TaskAd
from loom.schemas.tokens import Token

SNAPSHOTS = "_snapshot"
"""Replaces the domain's token in the subject of a snapshot."""


class Signal(CheckedMessage, frozen=True, kw_only=True):
    """The parts of a reward, for people; ADAPT does not use them."""

    quality: Unit = 0.0
    efficiency: Unit = 0.0
    """1 - tokens / budget, not below 0."""
    reliability: Unit = 0.0
    total: Unit = 0.0
    """.5 quality + .3 efficiency + .2 reliability."""


SUCCESS_QUALITY = 0.7
"""Quality of a success that has not been judged."""


def success_signal(ad: TaskAd, tokens: int, errors: int) -> Signal:
    """Return the parts of the reward of a successful run.

    Args:
        ad: Efficiency is measured by its `token_budget`; without one by 4096 tokens.
        tokens: Tokens of the run.
        errors: Errors during the run, such as failed tool calls.
    """
    budget = DEFAULT_TOKEN_YARDSTICK if ad.token_budget is None else max(ad.token_budget, 1)
    efficiency = 1 - min(max(tokens, 0), budget) / budget
    reliability = 0.0 if errors else 1.0
    total = 0.5 * SUCCESS_QUALITY + 0.3 * efficiency + 0.2 * reliability
    return Signal(quality=SUCCESS_QUALITY, efficiency=efficiency, reliability=reliability, total=total)


class Snapshot(CheckedMessage, frozen=True, kw_only=True):
    """Profile of one node after all rewards up to `through`; a round of snapshots has one per node."""

    through: Count
    """Sequence in REWARDS; equal in the whole round."""
    nodes: Count
    """Number of snapshots of the round; a round with fewer was not finished."""
    profile: NodeProfile


class Reward(CheckedMessage, frozen=True, kw_only=True):
    """The score of one attempt by one source."""

    reward_id: Annotated[str, Meta(max_length=200)]
    """`task:attempt:source`; a later reward of the same source for the same attempt replaces the earlier one.
    inherit: `inherit:` and the name of the other node."""
    kind: Literal["reward", "inherit", "snapshot"] = "reward"
    """inherit: the mean of another node that retired or changed its name; it counts as one observation.
    snapshot: not a reward but the state from which a rebuild starts. Both come only from the source `adapt`."""
    task_id: Token
    """inherit: the other node's id instead; snapshot: the node's own."""
    attempt: Count
    source: Token = RULES
    """The judge: the source in the subject."""
    node_id: Token
    owner: Token = LOCAL_OWNER
    """Owner of the node."""
    domain_token: Token
    score: Unit
    """0 useless to 1 perfect; ADAPT adds it to the profile."""
    signal: Signal = Signal()
    tokens: Count = 0
    seconds: Seconds = 0.0
    ended_at: Timestamp
    """When the attempt ended, server time."""
    estimated: Unit | None = None
    """SENSE's estimate of the complexity before calibration; absent: the ad has one, or the run does not show it."""
    reason: Annotated[str, Meta(max_length=500)] = ""
    labels: Labels = {}
    """Labels of the ad."""
    snapshot: Snapshot | None = None

    @property
    def node_key(self) -> str:
        """Key of the stored profile of its node."""
        return node_key(self.owner, self.node_id)

    @property
    def node(self) -> str:
        """The node as people write it."""
        return qualified(self.owner, self.node_id)

    def __hash__(self) -> int:
        """Return a hash, so that rewards may be members of a set with the dictionary of labels in them."""
        return hash((self.reward_id, self.score))
