"""A self-organising cluster of agents on NATS."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loom.agents.event_bus import EventBus
    from loom.agents.host.delegation import delegate
    from loom.agents.job import Answer, Job
    from loom.agents.llm.agent import Agent
    from loom.agents.llm.config import AgentConfig
    from loom.agents.llm.openai.openai_provider import OpenAIProvider
    from loom.agents.tools import Lifespan, Tool, ToolContext, ToolRegistry, ToolResult, define_tool, tool
    from loom.compat.amoeba_loop import AmoebaLoop
    from loom.compat.cluster_manager import ClusterManager
    from loom.compat.lifecycle import LifecycleManager
    from loom.compat.loop_context import LoopContext
    from loom.compat.planner import TaskPlanner
    from loom.compat.reward_formulas import RewardBus
    from loom.compat.skill_registry import SkillNodeRegistry
    from loom.runtime import Runtime
    from loom.schemas.config import ClusterConfig
    from loom.schemas.errors import AgentFailed, InvalidTask, LoomError
    from loom.schemas.llm import UserMessage
    from loom.schemas.task import TaskAd
    from loom.types import (
        Done,
        DoneEvent,
        ErrorEvent,
        ReasoningDelta,
        ReasoningDeltaEvent,
        StepEnd,
        StepEndEvent,
        StepStart,
        StepStartEvent,
        TextDelta,
        TextDeltaEvent,
        ToolCallEnd,
        ToolCallEndEvent,
        ToolCallStart,
        ToolCallStartEvent,
    )

__all__ = [
    "Agent",
    "AgentConfig",
    "AgentFailed",
    "AmoebaLoop",
    "Answer",
    "ClusterConfig",
    "ClusterManager",
    "Done",
    "DoneEvent",
    "ErrorEvent",
    "EventBus",
    "InvalidTask",
    "Job",
    "LifecycleManager",
    "Lifespan",
    "LoomError",
    "LoopContext",
    "OpenAIProvider",
    "ReasoningDelta",
    "ReasoningDeltaEvent",
    "RewardBus",
    "Runtime",
    "SkillNodeRegistry",
    "StepEnd",
    "StepEndEvent",
    "StepStart",
    "StepStartEvent",
    "TaskAd",
    "TaskPlanner",
    "TextDelta",
    "TextDeltaEvent",
    "Tool",
    "ToolCallEnd",
    "ToolCallEndEvent",
    "ToolCallStart",
    "ToolCallStartEvent",
    "ToolContext",
    "ToolRegistry",
    "ToolResult",
    "UserMessage",
    "define_tool",
    "delegate",
    "tool",
]

_HOMES = {
    "Agent": "agents.llm.agent",
    "AgentConfig": "agents.llm.config",
    "AgentFailed": "schemas.errors",
    "AmoebaLoop": "compat.amoeba_loop",
    "Answer": "agents.job",
    "ClusterConfig": "schemas.config",
    "ClusterManager": "compat.cluster_manager",
    "EventBus": "agents.event_bus",
    "InvalidTask": "schemas.errors",
    "Job": "agents.job",
    "LifecycleManager": "compat.lifecycle",
    "TaskPlanner": "compat.planner",
    "Lifespan": "agents.tools",
    "LoomError": "schemas.errors",
    "LoopContext": "compat.amoeba_loop",
    "OpenAIProvider": "agents.llm.openai.openai_provider",
    "RewardBus": "compat.reward_formulas",
    "Runtime": "runtime",
    "SkillNodeRegistry": "compat.skill_registry",
    "TaskAd": "schemas.task",
    "Tool": "agents.tools",
    "ToolContext": "agents.tools",
    "ToolRegistry": "agents.tools",
    "ToolResult": "agents.tools",
    "UserMessage": "schemas.llm",
    "define_tool": "agents.tools",
    "delegate": "agents.host.delegation",
    "tool": "agents.tools",
}

_HOMES |= dict.fromkeys(
    (
        "Done",
        "DoneEvent",
        "ErrorEvent",
        "ReasoningDelta",
        "ReasoningDeltaEvent",
        "StepEnd",
        "StepEndEvent",
        "StepStart",
        "StepStartEvent",
        "TextDelta",
        "TextDeltaEvent",
        "ToolCallEnd",
        "ToolCallEndEvent",
        "ToolCallStart",
        "ToolCallStartEvent",
    ),
    "types",
)


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import loom` itself stays cheap."""
    if name == "__version__":
        return import_module("importlib.metadata").version("loom-nats")
    if name not in _HOMES:
        raise AttributeError(f"module 'loom' has no attribute {name!r}")
    value = getattr(import_module(f"loom.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted([*__all__, "__version__"])
