"""The reward formulas of loom-agent 0.6, on top of the reward topic."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from loom.bus import rewards
from loom.schemas.learning.reward import Signal, success_signal
from loom.schemas.task import TaskAd

if TYPE_CHECKING:
    from loom.bus.bus import Bus

PRIOR = 0.5
"""Score of a node in a domain without rewards; old scores fade towards it."""
WIN = 0.5
"""Rewards above this raise the success rate."""
DAY_S = 86_400.0


class Graded(Protocol):
    """The parts of a reward, each in [0, 1]."""

    @property
    def quality(self) -> float: ...  # noqa: D102 - the three parts of a signal
    @property
    def efficiency(self) -> float: ...  # noqa: D102
    @property
    def reliability(self) -> float: ...  # noqa: D102


class Earned(Protocol):
    """One reward in the history of a node."""

    @property
    def domain(self) -> str: ...  # noqa: D102
    @property
    def timestamp(self) -> float: ...  # noqa: D102


class Capabilities(Protocol):
    """The learned skills of a node, for example a `loom.types.CapabilityProfile`."""

    scores: dict[str, float]
    total_tasks: int
    success_rate: float

    def key(self, domain: str) -> str:
        """Return the spelling under which `scores` contains `domain`."""
        ...


class Learner(Protocol):
    """A node that learns, for example a `loom.types.AgentNode`."""

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


class RewardBus(rewards.RewardBus):
    """The reward topic with the reward and decay formulas of loom-agent 0.6.

    Args:
        alpha: Weight of the newest reward in a moving average, 0 to 1.
        decay_rate: Not supported; any value raises TypeError.
        half_life_days: Days without work after which a score is half as far from .5 as it was.
        bus: Needed by `publish`, `subscribe` and `replay` only.
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
        super().__init__(bus)
        self.alpha = alpha
        self.half_life_days = half_life_days

    def compute_signal(self, task: TaskAd, success: bool, token_cost: int = 0, error_count: int = 0) -> Signal:
        """Return the parts of a run's reward. All of them are 0 after a failure: failing fast must not pay.

        Args:
            task: Efficiency is measured by its `token_budget`; without one by 4096 tokens.
            success: Whether the task succeeded.
            token_cost: Tokens of the run.
            error_count: Errors during the run, such as failed tool calls.
        """
        return success_signal(task, token_cost, error_count) if success else Signal()

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
            task: Its domain is `general` if the ad has none.
            success: Whether the task succeeded.
            token_cost: Tokens of the run.
            error_count: Errors during the run.
            now: When the run ended, seconds since the epoch; default: the present.
        """
        reward = self.compute_signal(task, success, token_cost, error_count).total
        at = time.time() if now is None else now
        learned = node.capabilities
        domain = learned.key(task.domain or "general")
        learned.scores[domain] = self._average(learned.scores.get(domain, PRIOR), reward)
        learned.success_rate = self._average(learned.success_rate, float(reward > WIN))
        learned.total_tasks += 1
        node.consecutive_losses = 0 if success else node.consecutive_losses + 1
        node.last_active_at = at
        node.remember(task_id=task.task_id, domain=domain, reward=reward, token_cost=token_cost, at=at)
        return reward

    def decay(self, node: Learner, *, now: float | None = None) -> None:
        """Let scores fade towards .5, by half of the distance per half-life since the domain's last reward.

        Only learned scores fade: a self-rating without any reward stays. The result does not depend on how often
        `decay` is called.

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

    def _average(self, old: float, new: float) -> float:
        return self.alpha * new + (1 - self.alpha) * old
