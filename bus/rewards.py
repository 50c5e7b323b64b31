"""What a run earned the node that did it, and how that changes what is known of the node."""

import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol

from msgspec.structs import replace

from loom.bus.logs.logger import get_logger
from loom.schemas.errors import BusUnavailable, InvalidTask
from loom.schemas.identity import LOCAL_OWNER, PERSON, split_qualified
from loom.schemas.learning import Reward, Signal
from loom.schemas.record import REJECTED, TaskRecord
from loom.schemas.task import DEFAULT_TOKEN_YARDSTICK, TaskAd
from loom.schemas.tokens import domain_token

if TYPE_CHECKING:
    from loom.bus.bus import Bus
    from loom.bus.natsio.publishing import PubAck

log = get_logger()

PRIOR = 0.5
"""Score of a node in a domain nothing is known about; what old scores fade towards."""
SUCCESS_QUALITY = 0.7
"""Quality of a success nobody has judged."""
WIN = 0.5
"""Rewards above this raise the success rate."""
DAY_S = 86_400.0


class Graded(Protocol):
    """A reward taken apart; each part in [0, 1]."""

    @property
    def quality(self) -> float: ...  # noqa: D102 - the three parts of a signal
    @property
    def efficiency(self) -> float: ...  # noqa: D102
    @property
    def reliability(self) -> float: ...  # noqa: D102


class Earned(Protocol):
    """One reward in a node's history."""

    @property
    def domain(self) -> str: ...  # noqa: D102
    @property
    def timestamp(self) -> float: ...  # noqa: D102


class Capabilities(Protocol):
    """What is known of a node's skill; `loom.types.CapabilityProfile` is one."""

    scores: dict[str, float]
    total_tasks: int
    success_rate: float

    def key(self, domain: str) -> str:
        """Return the wording under which `scores` holds `domain`."""
        ...


class Learner(Protocol):
    """A node that learns; `loom.types.AgentNode` is one."""

    consecutive_losses: int
    last_active_at: float
    decayed_at: float

    @property
    def capabilities(self) -> Capabilities: ...  # noqa: D102
    @property
    def reward_history(self) -> Sequence[Earned]: ...  # noqa: D102

    def remember(self, *, task_id: str, domain: str, reward: float, token_cost: int, at: float) -> None:
        """Append to the history, within its bound."""
        ...


class RewardBus:
    """Turns outcomes into rewards and rewards into what is known of a node; with a bus, the topic they travel on.

    Args:
        bus: Needed by `publish`, `subscribe` and `replay` only.
        alpha: Weight of the newest reward in a moving average, 0 to 1.
        decay_rate: Not supported; any value raises TypeError.
        half_life_days: Days without work after which a score is half as far from .5 as it was.
    """

    def __init__(
        self,
        alpha: float = 0.3,
        decay_rate: None = None,
        *,
        half_life_days: float = 30.0,
        bus: "Bus | None" = None,
    ) -> None:
        if decay_rate is not None:
            raise TypeError(
                "RewardBus has no decay_rate: a score times decay_rate per day is next to 0 after one day; "
                "scores fade towards .5 instead, by half per half_life_days"
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, not {alpha}")
        if not half_life_days > 0:
            raise ValueError(f"half_life_days must be more than 0, not {half_life_days}")
        self.alpha = alpha
        self.half_life_days = half_life_days
        self.bus = bus

    def compute_signal(self, task: TaskAd, success: bool, token_cost: int = 0, error_count: int = 0) -> Signal:
        """Return what a run was worth, in parts. A failure is worth nothing: failing fast must not pay.

        Args:
            task: Efficiency is measured by its `token_budget`; without one by 4096 tokens.
            success: Whether the task succeeded.
            token_cost: Tokens the run took.
            error_count: Errors on the way, such as failed tool calls.
        """
        if not success:
            return Signal()
        budget = DEFAULT_TOKEN_YARDSTICK if task.token_budget is None else max(task.token_budget, 1)
        efficiency = 1 - min(max(token_cost, 0), budget) / budget
        reliability = 0.0 if error_count else 1.0
        parts = Signal(quality=SUCCESS_QUALITY, efficiency=efficiency, reliability=reliability)
        return replace(parts, total=self.compute_reward(parts))

    def compute_reward(self, signal: Graded) -> float:
        """Return .5 quality + .3 efficiency + .2 reliability, in [0, 1]."""
        return 0.5 * signal.quality + 0.3 * signal.efficiency + 0.2 * signal.reliability

    def evaluate(
        self,
        node: Learner,
        task: TaskAd,
        success: bool,
        token_cost: int = 0,
        error_count: int = 0,
        *,
        now: float | None = None,
    ) -> float:
        """Fold one run of `task` into `node` and return its reward.

        The domain's score and the success rate (share of rewards above .5) are moving averages of weight alpha.

        Args:
            node: Its counters, scores and history change.
            task: Its domain is `general` when it names none.
            success: Whether the task succeeded.
            token_cost: Tokens the run took.
            error_count: Errors on the way.
            now: When it ended, seconds since the epoch; default: the present.
        """
        reward = self.compute_signal(task, success, token_cost, error_count).total
        at = time.time() if now is None else now
        known = node.capabilities
        domain = known.key(task.domain or "general")
        known.scores[domain] = self._moved(known.scores.get(domain, PRIOR), reward)
        known.success_rate = self._moved(known.success_rate, float(reward > WIN))
        known.total_tasks += 1
        node.consecutive_losses = 0 if success else node.consecutive_losses + 1
        node.last_active_at = at
        node.remember(task_id=task.task_id, domain=domain, reward=reward, token_cost=token_cost, at=at)
        return reward

    def decay(self, node: Learner, *, now: float | None = None) -> None:
        """Let scores fade towards .5, by half of the distance per half-life since the domain's last reward.

        Only what has been learned fades: a claim without any reward stays. How often it is called makes no
        difference.

        Args:
            node: Its scores change.
            now: Seconds since the epoch; default: the present.
        """
        at = time.time() if now is None else now
        scores = node.capabilities.scores
        newest: dict[str, float] = {}
        for record in node.reward_history:
            domain = node.capabilities.key(record.domain)
            newest[domain] = max(record.timestamp, newest.get(domain, record.timestamp))
        for domain in newest.keys() & scores.keys():
            days = max(0.0, at - max(newest[domain], node.decayed_at)) / DAY_S
            scores[domain] = PRIOR + (scores[domain] - PRIOR) * 0.5 ** (days / self.half_life_days)
        node.decayed_at = max(node.decayed_at, at)

    def _moved(self, old: float, new: float) -> float:
        return self.alpha * new + (1 - self.alpha) * old

    def publish(self, reward: Reward) -> "Coroutine[Any, Any, PubAck]":
        """Store a reward on the bus, to be awaited; anyone may, and the same one twice counts once.

        Raises:
            BusUnavailable: There is no bus, or the server does not confirm.
        """
        from loom.bus.hops.duplicates import store_once  # noqa: PLC0415 - brings nats-py, as above

        bus = self._connected()
        # A revised score is a new message; the same one again is dropped within the server's window.
        digest = blake2b(repr(float(reward.score)).encode(), digest_size=4).hexdigest()
        subject = bus.subjects.of("reward", reward.source, reward.owner, reward.node_id, reward.domain_token)
        return store_once(bus, subject, reward, msg_id=f"{reward.reward_id}:{digest}")

    def subscribe(self, *, node_id: str | None = None, domain: str | None = None) -> AsyncIterator[Reward]:
        """Yield every reward published from the first step of the iteration on.

        Args:
            node_id: Of this node alone: `node_id`, or `owner.node_id` where the owner is not `local`.
            domain: Of this domain alone.
        """
        return self._read(node_id, domain, deliver="new", to_the_end=False)

    def replay(self, *, node_id: str | None = None, domain: str | None = None) -> AsyncIterator[Reward]:
        """Yield every reward the stream still holds, in stream order, and end; arguments as for `subscribe`."""
        return self._read(node_id, domain, deliver="all", to_the_end=True)

    async def _read(
        self, node_id: str | None, domain: str | None, *, deliver: str, to_the_end: bool
    ) -> AsyncIterator[Reward]:
        # Both bring nats-py, which the formulas do without.
        from loom.bus.natsio.ordered_consumer import OrderedConsumer  # noqa: PLC0415 - see above
        from loom.bus.stored_rewards import reward_in  # noqa: PLC0415 - see above

        bus = self._connected()
        node = split_qualified(node_id) if node_id else ("*", "*")
        filter_subject = bus.subjects.of("reward", "*", *node, domain_token(domain) if domain else "*")
        reader = OrderedConsumer(bus.jetstream, bus.subjects.stream("REWARDS"), filter=filter_subject, deliver=deliver)
        try:
            while True:
                for message in await reader.batch():
                    reward = reward_in(message, bus.subjects, bus.discards)
                    if reward is not None and reward.kind != "snapshot":  # no node has earned a snapshot
                        yield reward
                if to_the_end and reader.caught_up:
                    return
        finally:
            await reader.stop()

    def _connected(self) -> "Bus":
        if self.bus is None:
            raise BusUnavailable("this RewardBus has no bus: pass one, or use the RewardBus of a running Runtime")
        return self.bus


def judgement(record: TaskRecord, score: float, reason: str, source: str = PERSON) -> Reward:
    """Return a person's reward for the node that finished a task.

    Args:
        record: Of a task that has ended.
        score: 0 useless to 1 perfect.
        reason: For people.
        source: The name of the person: `bus.identity.source`.

    Raises:
        InvalidTask: No node has finished the task, or the score is out of range.
    """
    owner, node_id, attempt = _judged(record)
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


def _judged(record: TaskRecord) -> tuple[str, str | None, int]:
    """Return owner, node and attempt of the answer a person sees: the best refused one, where none was accepted."""
    envelope, best = record.envelope, record.envelope.best_rejected
    if best is None or not (record.rejected or record.below_threshold):
        result = record.to_result()
        return result.owner or LOCAL_OWNER, result.node_id, envelope.attempt
    by = (best.owner, best.node_id)
    refused = [
        each.attempt for each in envelope.failed_attempts if (each.owner, each.node_id) == by and each.code == REJECTED
    ]
    return *by, refused[-1] if refused else envelope.attempt


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else f"a {type(value).__name__}"
