"""The names that `loom` exports."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
from support.pages import programs, table, text_of

import loom

EXPORTS = [
    "Accept",
    "Agent",
    "AgentConfig",
    "AgentEvent",
    "AgentFailed",
    "AgentNode",
    "AmoebaLoop",
    "Answer",
    "AssistantMessage",
    "BestRejected",
    "BudgetExceeded",
    "BusUnavailable",
    "Cancelled",
    "CapabilityProfile",
    "ClusterConfig",
    "ClusterManager",
    "CompletionParams",
    "CompletionResult",
    "DeadLettered",
    "DeadlineExceeded",
    "Done",
    "DoneEvent",
    "ErrorEvent",
    "EventBus",
    "InvalidPlan",
    "InvalidTask",
    "Job",
    "LLMProvider",
    "LifecycleManager",
    "Lifespan",
    "Limits",
    "LoomError",
    "LoopContext",
    "Message",
    "NoBids",
    "NodeBusy",
    "NodeLost",
    "NodeOverview",
    "OpenAIProvider",
    "Overloaded",
    "ReasoningDelta",
    "ReasoningDeltaEvent",
    "RejectedResult",
    "RewardBus",
    "RunRequest",
    "RunResult",
    "Runtime",
    "Skill",
    "SkillNodeRegistry",
    "SkillTrigger",
    "StepEnd",
    "StepEndEvent",
    "StepStart",
    "StepStartEvent",
    "StreamChunk",
    "SubtaskFailed",
    "SystemMessage",
    "TaskAd",
    "TaskError",
    "TaskFailed",
    "TaskHandle",
    "TaskPlanner",
    "TaskResult",
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
    "UnknownTask",
    "Usage",
    "UserMessage",
    "WrongEventLoop",
    "define_tool",
    "delegate",
    "tool",
]


def test_the_exports_are_the_listed_ones() -> None:
    assert loom.__all__ == EXPORTS, "an addition needs a line in docs/api.md and CHANGELOG"
    assert dir(loom) == sorted([*EXPORTS, "__version__"])


def test_the_stub_lists_each_name_once() -> None:
    stub = ast.parse(Path(loom.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    aliases = [alias for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]

    assert sorted(alias.name for alias in aliases) == EXPORTS
    assert all(alias.asname == alias.name for alias in aliases)


def test_a_module_that_the_stub_names_defines_the_name() -> None:
    stub = ast.parse(Path(loom.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    for node in stub.body:
        if isinstance(node, ast.ImportFrom):
            assert getattr(loom, node.names[0].name) is getattr(import_module(str(node.module)), node.names[0].name)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Runtme'"):
        loom.Runtme  # type: ignore[attr-defined]  # noqa: B018


def test_every_export_is_in_a_table_and_an_example_of_the_api_page() -> None:
    page = "docs/api.md"
    headings = re.findall(r"(?m)^## (.*)$", text_of(page))
    named = [row[0].strip("`") for heading in headings for row in table(page, heading)]
    code = "\n".join(program.code for program in programs(page))

    assert sorted(named) == EXPORTS
    assert [name for name in EXPORTS if not re.search(rf"\b{name}\b", code)] == []
