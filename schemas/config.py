"""Settings of a cluster. Names and defaults are those of loom-agent 0.6 where it has them."""

from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from loom.schemas.base import CheckedMessage, Count, Ordinal, Seconds, Unit
from loom.schemas.checks.constructor_errors import FieldsByName
from loom.schemas.tokens import Token

NOT_SETTINGS = {
    "bid_weights": "the weights are fixed, and `policy` rules how bidders are trusted",
    "min_bids": "one bid is enough, and no_bids_after_s limits the wait for it",
    "fallback_strategy": "a task without any bid ends with NoBids after no_bids_after_s",
}
"""Settings of loom-agent 0.6 that have no counterpart, and why."""
BLUEPRINTS = "blueprint_"
"""Prefix of further settings without a counterpart."""

PROCESS_SETTINGS = frozenset({"drain_timeout_s", "learn_wait_s"})
"""Settings that may differ between the processes of a namespace."""

Weight = Annotated[float, Meta(ge=0, le=1000)]


class _OldNames(FieldsByName):
    """Accepts `idle_timeout` for `idle_timeout_s`, and refuses other settings of loom-agent 0.6 with the reason."""

    if not TYPE_CHECKING:  # type checkers read the fields' own signature

        def __call__(self, *args: Any, **given: Any) -> Any:
            """Build the config.

            Raises:
                TypeError: An argument is positional, or the setting does not exist.
            """
            if "idle_timeout" in given:
                given.setdefault("idle_timeout_s", given.pop("idle_timeout"))
            for name in given:
                if name.startswith(BLUEPRINTS):
                    raise TypeError(f"ClusterConfig has no {name}: nodes are made of skills, see SkillNodeRegistry")
                if name in NOT_SETTINGS:
                    raise TypeError(f"ClusterConfig has no {name}: {NOT_SETTINGS[name]}")
            return super().__call__(*args, **given)


class ClusterConfig(CheckedMessage, frozen=True, kw_only=True, metaclass=_OldNames):
    """Settings by which the phases decide. Every field has a default."""

    min_nodes: Count = 1
    """Apoptosis retires no node of a cluster with at most as many nodes."""
    max_nodes: Ordinal = 10
    """Mitosis adds no node to a cluster with at least as many nodes."""
    max_depth: Annotated[int, Meta(ge=0, le=16)] = 2
    """Most divisions between a client's task and its deepest subtask."""
    mitosis_threshold: Unit = 0.6
    """Tasks with a higher complexity are divided."""
    max_subtasks: Annotated[int, Meta(ge=1, le=64)] = 16
    """Most subtasks of a task."""
    apoptosis_threshold: Unit = 0.3
    """A node with a lower mean of recent rewards is failing."""
    idle_timeout_s: Seconds = 300.0
    """Idle time after which a node that was started on request may retire."""
    consecutive_loss_limit: Ordinal = 20
    """Consecutive failures after which a node is failing."""
    bid_window_ms: Annotated[int, Meta(ge=1, le=10_000)] = 250
    """Longest wait for offers."""
    no_bids_after_s: Seconds = 30.0
    """Seconds that a task without any offer waits before it fails with `no_bids`."""
    waiting_limit: Ordinal = 64
    """Tasks per lane that wait in MATCH while all nodes are busy."""
    policy: Annotated[str, Meta(min_length=1, max_length=200)] = "glr_ucb"
    """Award policy of MATCH: glr_ucb, ucb, thompson, greedy, round_robin, random, or `module:function`."""
    exploration: Annotated[float, Meta(ge=0, le=1e9)] = 0.3
    """Weight of the bonus for nodes with little evidence (c of UCB)."""
    half_life_days: Annotated[float, Meta(ge=0.001, le=1e15)] = 14.0
    """Days without rewards after which the evidence about a node counts half."""
    judge_share: Unit = 0.0
    """Share of results without a rubric that a model judges as well, if EVALUATE has a model."""
    judge_weights: dict[Token, Weight] = {}
    """Weight of each reward source when several score the same attempt. 0 ignores the source. Default: 3 for `person`,
    1 for all others."""
    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 3
    """Most failed attempts of a task for which nodes are to blame."""
    max_in_flight: Ordinal = 1000
    """SENSE admits no further task while TASKS has more hops."""
    intake_limit: Ordinal = 100_000
    """Most submissions in INTAKE; further ones are refused with `overloaded`."""
    drain_timeout_s: Seconds = 10.0
    """Longest wait for running work when a process stops."""
    learn_wait_s: Seconds = 2.0
    """Longest wait of `AmoebaLoop.execute` for ADAPT."""
    replicas: Annotated[int, Meta(ge=1, le=5)] = 1
    """Copies of every stream and bucket, each on another server."""

    @property
    def idle_timeout(self) -> float:
        """The same as `idle_timeout_s`."""
        return self.idle_timeout_s

    @property
    def shared(self) -> dict[str, Any]:
        """Name -> value of the settings that all processes of a namespace must have in common."""
        return {name: getattr(self, name) for name in self.__struct_fields__ if name not in PROCESS_SETTINGS}

    def __post_init__(self) -> None:
        super().__post_init__()
        for source, weight in self.judge_weights.items():
            if not 0 <= weight <= 1000:  # noqa: PLR2004 - as declared; false for NaN
                raise ValueError(f"ClusterConfig.judge_weights must be numbers from 0 to 1000, not {source}={weight}")
