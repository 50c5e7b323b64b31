"""The event bus and the events, by the import path of loom-agent 0.6."""

from loom.agents.event_bus import EventBus
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
from loom.types import (
    DoneEvent,
    ReasoningDeltaEvent,
    StepEndEvent,
    StepStartEvent,
    TextDeltaEvent,
    ToolCallEndEvent,
    ToolCallStartEvent,
)

__all__ = [
    "AgentEvent",
    "Done",
    "DoneEvent",
    "ErrorEvent",
    "EventBus",
    "LoopEvent",
    "PhaseEvent",
    "ReasoningDelta",
    "ReasoningDeltaEvent",
    "StepEnd",
    "StepEndEvent",
    "StepStart",
    "StepStartEvent",
    "SubtaskEvent",
    "TextDelta",
    "TextDeltaEvent",
    "TokenUsage",
    "ToolCallEnd",
    "ToolCallEndEvent",
    "ToolCallStart",
    "ToolCallStartEvent",
]
