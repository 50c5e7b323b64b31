"""Types for programs, by the import path of loom-agent 0.6; `loom` exports the current ones as well."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loom.agents.job import Answer, Job
from loom.compat.types import AgentBlueprint, Bid, ComplexityEstimate, HealthReport, RewardSignal, SubTask, TaskSpec
from loom.nodes import AgentNode, CapabilityProfile, NodeStatus, RewardRecord
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
    """Import the classes of tools on first access: the other types load faster."""
    if name not in _OF_TOOLS:
        raise AttributeError(f"module 'loom.types' has no attribute {name!r}")
    return getattr(import_module("loom.agents.tools"), name)


TextDeltaEvent = TextDelta
ReasoningDeltaEvent = ReasoningDelta
ToolCallStartEvent = ToolCallStart
ToolCallEndEvent = ToolCallEnd
StepStartEvent = StepStart
StepEndEvent = StepEnd
DoneEvent = Done
