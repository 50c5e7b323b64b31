"""Rewards, the profiles learned from them, and related messages."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from loom.schemas.base import CheckedMessage, Count, Name, Names, Note, Seconds, Timestamp, Unit
from loom.schemas.checks.labels import Labels
from loom.schemas.errors import InvalidTask
from loom.schemas.identity import LOCAL_OWNER, PERSON, RULES, node_key, qualified
from loom.schemas.record import REJECTED, TaskRecord
from loom.schemas.task import DEFAULT_TOKEN_YARDSTICK, TaskAd
from loom.schemas.tokens import Token

WINDOW = 120
"""Most scores per node and domain: the newest."""
SNAPSHOTS = "_snapshot"
"""Replaces the domain's token in the subject of a snapshot."""
BIAS = "bias."
"""Prefix of the keys of calibrations in the bucket `tuning`; the domain_token follows."""


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


SUMMARY_KEYS = "*.*.summary"
"""Filter of the keys of summaries in the bucket `nodes`; `PROFILE_KEYS` is that of the profiles."""
PROFILE_KEYS = "*.*"


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


class Calibration(CheckedMessage, frozen=True, kw_only=True):
    """Error of SENSE's estimates in one domain."""

    domain_token: Token
    bias: Annotated[float, Meta(ge=-1, le=1)] = 0.0
    """Moving average of actual less estimated complexity."""
    count: Count = 0
    """Number of tasks in the average."""
    last_seq: Count = 0
    """Sequence in REWARDS of the last reward folded."""


class Lease(CheckedMessage, frozen=True, kw_only=True):
    """The replica that may act, and until when."""

    holder: Name
    until: Timestamp
    """Server time."""


LifecycleKind = Literal["joined", "left", "spawned", "retired", "changed", "learned"]


class Lifecycle(CheckedMessage, frozen=True, kw_only=True):
    """An event in the life of a node."""

    kind: LifecycleKind
    node_id: Token
    owner: Token = LOCAL_OWNER
    host_id: Name = ""
    at: Timestamp
    task_ids: Names = ()
    """learned: tasks whose rewards are new in the profile."""
    profile: NodeProfile | None = None
    """learned: the new profile."""
    reason: Note = ""


def judgement(record: TaskRecord, score: float, reason: str, source: str = PERSON) -> Reward:
    """Return a person's reward for the node that finished a task.

    Args:
        record: Record of a task that has ended.
        score: From 0 (useless) to 1 (perfect).
        reason: Explanation for readers; truncated to 500 characters.
        source: Name of the person: `bus.identity.source`.

    Raises:
        InvalidTask: No node has finished the task, or the score is out of range.
    """
    owner, node_id, attempt = _judged_attempt(record)
    if not record.ended or node_id is None:
        raise InvalidTask("only a task that a node has finished can be judged", task_id=record.task_id)
    if not _is_share(score):
        why = f"score must be from 0 to 1, not {_shown(score)}: 0 is useless, 1 perfect"
        raise InvalidTask(why, field="score", task_id=record.task_id)
    return Reward(
        reward_id=f"{record.task_id}:{attempt}:{source}",
        task_id=record.task_id,
        attempt=attempt,
        source=source,
        node_id=node_id,
        owner=owner,
        domain_token=record.envelope.domain_token,
        score=score,
        ended_at=record.ended_at or record.admitted_at,
        reason=reason[:500],
        labels=record.envelope.ad.labels,
    )


def _judged_attempt(record: TaskRecord) -> tuple[str, str | None, int]:
    """Return owner, node and attempt of the result that a person sees: the best rejected one if none was accepted."""
    envelope, best = record.envelope, record.envelope.best_rejected
    if best is None or not (record.rejected or record.below_threshold):
        result = record.to_result()
        return result.owner or LOCAL_OWNER, result.node_id, envelope.attempt
    node = (best.owner, best.node_id)
    rejected = [
        failed.attempt
        for failed in envelope.failed_attempts
        if (failed.owner, failed.node_id) == node and failed.code == REJECTED
    ]
    return *node, rejected[-1] if rejected else envelope.attempt


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else f"a {type(value).__name__}"
