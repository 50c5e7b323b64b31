"""Types that only the API of loom-agent 0.6 has."""

import time
from dataclasses import dataclass, field
from typing import Literal
from uuid import uuid4

from loom.nodes import short_id
from loom.phases.shared.node_health import Standing


@dataclass
class RewardSignal:
    """The parts of a reward, each 0 to 1."""

    quality: float = 0.0
    efficiency: float = 0.0
    reliability: float = 0.0


@dataclass
class Bid:
    """A node's bid in an auction within one process."""

    agent_id: str = ""
    task_id: str = ""
    score: float = 0.0
    breakdown: dict[str, float] = field(default_factory=dict)
    """capability, availability, history, tools -> 0 to 1, without weights."""
    estimated_tokens: int = 0
    """0: not estimated."""


@dataclass
class SubTask:
    """A subtask of a divided task."""

    id: str = field(default_factory=short_id)
    description: str = ""
    domain: str = ""
    dependencies: list[str] = field(default_factory=list)
    """Ids of the subtasks whose outputs it needs."""
    estimated_complexity: float = 0.3


@dataclass
class TaskSpec:
    """A task with explicit objective, format and boundaries."""

    task: str
    objective: str = ""
    output_format: str = ""
    boundaries: str = ""
    tool_guidance: str = ""
    domain_hints: list[str] = field(default_factory=list)


@dataclass
class ComplexityEstimate:
    """Estimated complexity of a task."""

    score: float = 0.5
    """0 trivial to 1 very hard."""
    domains: list[str] = field(default_factory=list)
    reasoning: str = ""
    method: Literal["heuristic", "llm"] = "heuristic"


@dataclass
class HealthReport:
    """Health of a node, with a recommendation."""

    node_id: str
    status: Literal["healthy", "warning", "dying"]
    recent_avg_reward: float
    """Mean of the ten newest rewards; 0 without any."""
    idle_ms: int
    """Milliseconds since its last activity; 0 while it is busy."""
    recommendation: Literal["keep", "merge", "recycle"]
    """merge: another node should inherit its scores; recycle: no node should."""
    standing: Standing = "new"
    """new: no judged task; unproven: fewer than ten; failing: most of three or more failed."""


@dataclass
class AgentBlueprint:
    """A template of nodes, with the success of those made from it."""

    id: str = field(default_factory=lambda: uuid4().hex)
    name: str = ""
    description: str = ""
    system_prompt: str = ""
    domain: str = "general"
    domain_scores: dict[str, float] = field(default_factory=dict)
    tools_filter: list[str] = field(default_factory=list)
    """Tools of a node made from it; empty: all tools of its parent."""
    created_at: float = field(default_factory=time.time)
    updated_at: float = field(default_factory=time.time)
    generation: int = 1
    parent_id: str | None = None
    total_spawns: int = 0
    total_tasks: int = 0
    avg_reward: float = 0.0
    reward_history: list[float] = field(default_factory=list)
