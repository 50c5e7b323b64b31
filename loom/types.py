"""The shapes Python users hold: nodes that change while they work, and the messages re-exported under one name."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from loom.agents.job import Answer, Job
from loom.phases.shared.node_health import Standing
from loom.schemas import auction
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import AgentFailed, InvalidTask
from loom.schemas.events import (
    AgentEvent,
    Done,
    ErrorEvent,
    LoopEvent,
    PhaseEvent,
    ReasoningDelta,
    StepEnd,
    StepStart,
    SubtaskEvent,
    TextDelta,
    TokenUsage,
    ToolCallEnd,
    ToolCallStart,
)
from loom.schemas.learning import WINDOW, DomainEvidence, NodeProfile
from loom.schemas.llm import (
    AnyProvider,
    AssistantMessage,
    CompletionParams,
    CompletionResult,
    LLMProvider,
    Message,
    StreamChunk,
    SystemMessage,
    ToolCall,
    ToolDefinition,
    Usage,
    UserMessage,
)
from loom.schemas.task import Accept, BestRejected, Limits, Priority, TaskAd, TaskError, TaskResult
from loom.schemas.tokens import domain_token

if TYPE_CHECKING:
    from loom.agents.tools import Tool, ToolContext, ToolRegistry, ToolResult, define_tool
from loom.skills import Skill, SkillTrigger

__all__ = [
    "Accept",
    "AgentBlueprint",
    "AgentEvent",
    "AgentFailed",
    "AgentNode",
    "Answer",
    "AnyProvider",
    "AssistantMessage",
    "BestRejected",
    "Bid",
    "CapabilityProfile",
    "ClusterConfig",
    "CompletionParams",
    "CompletionResult",
    "ComplexityEstimate",
    "Done",
    "DoneEvent",
    "ErrorEvent",
    "HealthReport",
    "InvalidTask",
    "Job",
    "LLMProvider",
    "Limits",
    "LoopEvent",
    "Message",
    "NodeStatus",
    "PhaseEvent",
    "Priority",
    "ReasoningDelta",
    "ReasoningDeltaEvent",
    "RewardRecord",
    "RewardSignal",
    "Skill",
    "SkillTrigger",
    "StepEnd",
    "StepEndEvent",
    "StepStart",
    "StepStartEvent",
    "StreamChunk",
    "SubTask",
    "SubtaskEvent",
    "SystemMessage",
    "TaskAd",
    "TaskError",
    "TaskResult",
    "TaskSpec",
    "TextDelta",
    "TextDeltaEvent",
    "TokenUsage",
    "Tool",
    "ToolCall",
    "ToolCallEnd",
    "ToolCallEndEvent",
    "ToolCallStart",
    "ToolCallStartEvent",
    "ToolContext",
    "ToolDefinition",
    "ToolRegistry",
    "ToolResult",
    "Usage",
    "UserMessage",
    "define_tool",
]

_OF_TOOLS = frozenset({"Tool", "ToolContext", "ToolRegistry", "ToolResult", "define_tool"})


def __getattr__(name: str) -> Any:
    """Import what tools are made of when it is asked for: the shapes alone stay cheap."""
    if name not in _OF_TOOLS:
        raise AttributeError(f"module 'loom.types' has no attribute {name!r}")
    return getattr(import_module("loom.agents.tools"), name)


NodeStatus = Literal["idle", "busy", "splitting", "dying"]

NEUTRAL = 0.5
"""What is assumed of a node nothing is known about."""
RATING_WEIGHT = 2
"""Rewards that a node's own rating of itself counts as."""


def _short_id() -> str:
    return uuid4().hex[:8]


def unit(value: float) -> float:
    """Return `value` clamped to [0, 1]; what is not a number counts as 0."""
    return value if 0 <= value <= 1 else min(1.0, max(0.0, value))


@dataclass
class CapabilityProfile:
    """What a node says it can do, and how it has done so far."""

    scores: dict[str, float] = field(default_factory=dict)
    """domain, any wording -> 0 useless to 1 expert."""
    tools: list[str] = field(default_factory=list)
    total_tasks: int = 0
    success_rate: float = NEUTRAL
    """0 to 1; neutral while nothing is known."""

    def key(self, domain: str) -> str:
        """Return the wording under which `scores` holds `domain`; `domain` itself when it holds none.

        Two wordings are one domain when they share a domain_token: `Code` and `code`, but not 代码 and 数据.
        """
        if domain in self.scores:
            return domain
        wanted = domain_token(domain)
        return next((name for name in self.scores if domain_token(name) == wanted), domain)

    def score(self, domain: str) -> float:
        """Return the score in `domain`, in [0, 1]; neutral for a domain not named."""
        known = self.scores.get(domain)
        return unit(self.scores.get(self.key(domain), NEUTRAL) if known is None else known)

    def tool_share(self, required: Collection[str]) -> float:
        """Return the share of the required tools it has, each counted once; 1 when none is required."""
        wanted = set(required)
        return len(wanted.intersection(self.tools)) / len(wanted) if wanted else 1.0


@dataclass
class RewardSignal:
    """A reward taken apart; each part 0 to 1."""

    quality: float = 0.0
    efficiency: float = 0.0
    reliability: float = 0.0


@dataclass
class RewardRecord:
    """What one task earned a node."""

    task_id: str = ""
    reward: float = 0.0
    domain: str = ""
    token_cost: int = 0
    timestamp: float = field(default_factory=time.time)
    """Seconds since the epoch."""


@dataclass
class AgentNode:
    """An agent's place in a cluster. It can bid before its `agent` is set, but run nothing."""

    id: str = field(default_factory=_short_id)
    parent_id: str | None = None
    depth: int = 0
    """Divisions between this node and one that was added by hand."""
    capabilities: CapabilityProfile = field(default_factory=CapabilityProfile)
    """A dict of ratings becomes a profile."""
    reward_history: list[RewardRecord] = field(default_factory=list)
    """Oldest first, at most 120 per domain."""
    status: NodeStatus = "idle"
    load: float = 0.0
    """0 free to 1 full."""
    agent: Any = None
    last_active_at: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    consecutive_losses: int = 0
    blueprint_id: str | None = None
    decayed_at: float = 0.0
    """Seconds since the epoch of the last decay of its scores; 0: never."""
    domains: Collection[str] | None = None
    """Domains it takes at all, in any wording; None: every one. A task pinned to the node needs no domain of it.

    Two wordings are one domain when they share a domain_token, as in `capabilities`.
    """
    self_ratings: dict[str, float] = field(default_factory=dict)
    """domain -> the rating of the node's maker, where `capabilities.scores` shows what has been learned instead."""
    _shown: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    """domain -> the learned score that `mirror` has put into `capabilities.scores`."""

    def __post_init__(self) -> None:
        if isinstance(self.capabilities, Mapping):
            self.capabilities = CapabilityProfile(scores=dict(self.capabilities))

    def takes(self, domain: str) -> bool:
        """Return whether it takes tasks of a domain (as worded, or its token): one it names, with a rating above 0."""
        return self.claim(domain) > 0

    def remember(self, *, task_id: str, domain: str, reward: float, token_cost: int, at: float) -> None:
        """Append a record to the history, dropping the domain's oldest past 120."""
        self.reward_history.append(RewardRecord(task_id, reward, domain, token_cost, at))
        same = [
            index
            for index, record in enumerate(self.reward_history)
            if domain_token(record.domain) == domain_token(domain)
        ]
        if len(same) > WINDOW:
            del self.reward_history[same[0]]

    def to_bid(self, *, domain: str, required_tools: Collection[str] = ()) -> auction.Bid:
        """Return what this node offers on the wire for a task of `domain` (its wording or its domain_token)."""
        own = self.tool_names()
        return auction.Bid(
            node_id=self.id,
            self_rating=self.claim(domain),
            load=unit(self.load),
            tools=tuple(tool for tool in dict.fromkeys(required_tools) if tool in own),
        )

    def tool_names(self) -> set[str]:
        """Return the names of the tools it has, itself or by its agent."""
        return {*self.capabilities.tools, *getattr(self.agent, "tools", ())}

    def has_tools(self, required: Collection[str]) -> bool:
        """Return whether it has all of these tools, itself or by its agent."""
        return not required or self.tool_names().issuperset(required)

    def claim(self, domain: str) -> float:
        """Return its own rating in a domain (as worded, or its token), in [0, 1]; 0: it does not take the domain.

        That is the rating of its maker, never what has been learned: the auction weighs the two against each other.
        """
        if self.domains is not None:
            wanted = domain_token(domain)
            names = (self.domains,) if isinstance(self.domains, str) else self.domains
            if not any(domain_token(name) == wanted for name in names):
                return 0.0
        key = self.capabilities.key(domain)
        if self._is_learned(key):
            return unit(self.self_ratings.get(key, NEUTRAL))
        return self.capabilities.score(domain)

    def named_domains(self) -> Collection[str]:
        """Return the domains, as worded, that it rates itself above 0 in or is limited to."""
        if self.domains is None:
            return [domain for domain in self.capabilities.scores if self.claim(domain) > 0]
        return (self.domains,) if isinstance(self.domains, str) else self.domains

    def _is_learned(self, key: str) -> bool:
        """Return whether a score is as `mirror` has left it; one set since is a new rating."""
        return key in self._shown and self._shown[key] == self.capabilities.scores.get(key)

    def mirror(self, profile: NodeProfile) -> None:
        """Take over what has been learned about this node; its maker's ratings are kept in `self_ratings`."""
        for name, evidence in profile.domains.items():
            if evidence.count:
                self._show(self.capabilities.key(name), evidence)
        facts = self.capabilities
        facts.total_tasks = profile.total_tasks
        facts.success_rate = profile.success_rate if profile.total_tasks else NEUTRAL
        self.consecutive_losses = profile.consecutive_losses
        self.reward_history = sorted(
            (
                RewardRecord(entry.attempt_id.split(":")[0], entry.score, facts.key(name), timestamp=entry.ended_at)
                for name, evidence in profile.domains.items()
                for entry in evidence.scores
            ),
            key=lambda record: record.timestamp,
        )
        if self.reward_history:
            self.last_active_at = max(self.last_active_at, self.reward_history[-1].timestamp)

    def _show(self, key: str, evidence: DomainEvidence) -> None:
        """Show the mean of the rewards as the score of a domain, the maker's rating counting as two of them."""
        scores = self.capabilities.scores
        if key in scores and not self._is_learned(key):
            self.self_ratings[key] = scores[key]
        rating = unit(self.self_ratings.get(key, NEUTRAL))
        learned = (evidence.mean * evidence.count + rating * RATING_WEIGHT) / (evidence.count + RATING_WEIGHT)
        scores[key] = self._shown[key] = learned


@dataclass
class Bid:
    """One node's offer in a cluster's own auction."""

    agent_id: str = ""
    task_id: str = ""
    score: float = 0.0
    breakdown: dict[str, float] = field(default_factory=dict)
    """capability, availability, history, tools -> 0 to 1, before weighing."""
    estimated_tokens: int = 0
    """0: not estimated."""


@dataclass
class SubTask:
    """A part of a task that was split."""

    id: str = field(default_factory=_short_id)
    description: str = ""
    domain: str = ""
    dependencies: list[str] = field(default_factory=list)
    """Ids of the subtasks whose outputs it needs."""
    estimated_complexity: float = 0.3


@dataclass
class TaskSpec:
    """A task spelled out for whoever does it."""

    task: str
    objective: str = ""
    output_format: str = ""
    boundaries: str = ""
    tool_guidance: str = ""
    domain_hints: list[str] = field(default_factory=list)


@dataclass
class ComplexityEstimate:
    """How hard a task looks."""

    score: float = 0.5
    """0 trivial to 1 very hard."""
    domains: list[str] = field(default_factory=list)
    reasoning: str = ""
    method: Literal["heuristic", "llm"] = "heuristic"


@dataclass
class HealthReport:
    """How a node fares, and what to do about it."""

    node_id: str
    status: Literal["healthy", "warning", "dying"]
    recent_avg_reward: float
    """Mean of the ten newest rewards; 0 without any."""
    idle_ms: int
    """Since the node last did something; 0 while it is busy."""
    recommendation: Literal["keep", "merge", "recycle"]
    """merge: its knowledge is worth passing on; recycle: it is not."""
    standing: Standing = "new"
    """new: no task of it has been judged; unproven: fewer than ten have; failing: most of three or more went wrong."""


@dataclass
class AgentBlueprint:
    """A recipe for new nodes, and how those made from it have done."""

    id: str = field(default_factory=lambda: uuid4().hex)
    name: str = ""
    description: str = ""
    system_prompt: str = ""
    domain: str = "general"
    domain_scores: dict[str, float] = field(default_factory=dict)
    tools_filter: list[str] = field(default_factory=list)
    """Tools a node made from it gets; empty: all its parent has."""
    created_at: float = field(default_factory=time.time)
    updated_at: float = field(default_factory=time.time)
    generation: int = 1
    parent_id: str | None = None
    total_spawns: int = 0
    total_tasks: int = 0
    avg_reward: float = 0.0
    reward_history: list[float] = field(default_factory=list)


TextDeltaEvent = TextDelta
ReasoningDeltaEvent = ReasoningDelta
ToolCallStartEvent = ToolCallStart
ToolCallEndEvent = ToolCallEnd
StepStartEvent = StepStart
StepEndEvent = StepEnd
DoneEvent = Done
