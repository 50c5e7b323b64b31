"""An agent with a scripted provider or server, and what may be asked of its events and its conversation."""

import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig
from loom.agents.tools import tool
from loom.schemas.events import AgentEvent, Done
from loom.schemas.llm import CompletionParams, CompletionResult, StreamChunk, ToolCall
from loom.schemas.run import RunRequest

JOB = RunRequest(task_id="t1", attempt=2, description="What is 2 + 3?", remaining_s=10)

MakeAgent = Callable[..., Agent]
"""make(*tools, **config): an agent whose model is the test's server."""


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Scripted:
    """A provider that gives its answers in order, each a list of pieces; an exception among them is raised.

    `complete` gives the pieces of an answer as one.
    """

    def __init__(self, *answers: Sequence[Any]) -> None:
        self._answers = list(answers)
        self.asked: list[CompletionParams] = []

    async def stream(self, params: CompletionParams) -> AsyncIterator[Any]:
        for piece in self._next(params):
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    async def complete(self, params: CompletionParams) -> CompletionResult:
        pieces = self._next(params)
        for piece in pieces:
            if isinstance(piece, BaseException):
                raise piece
        last = pieces[-1]
        return CompletionResult(
            content="".join(piece.text for piece in pieces),
            reasoning="".join(piece.reasoning for piece in pieces),
            refusal="".join(piece.refusal for piece in pieces),
            tool_calls=tuple(call for piece in pieces for call in piece.tool_calls),
            usage=last.usage,
            finish_reason=last.finish_reason,
        )

    def agent(self, *tools: Any, **config: Any) -> Agent:
        """An agent that asks this provider."""
        return Agent(self, AgentConfig(**config), tools=tools)

    def _next(self, params: CompletionParams) -> Sequence[Any]:
        self.asked.append(params)
        return self._answers.pop(0)


def answering(text: str, finish_reason: str = "stop") -> list[StreamChunk]:
    """An answer in two pieces."""
    return [StreamChunk(text=text[:3]), StreamChunk(text=text[3:], finish_reason=finish_reason)]


def wanting(*calls: ToolCall, text: str = "", reasoning: str = "") -> list[StreamChunk]:
    """An answer that asks for tools."""
    return [StreamChunk(text=text, reasoning=reasoning, tool_calls=calls, finish_reason="tool_calls")]


async def events_of(agent: Agent, job: RunRequest | str = JOB) -> list[AgentEvent]:
    return [event async for event in agent.stream(job)]


def done_of(events: list[AgentEvent]) -> Done:
    assert isinstance(events[-1], Done)
    return events[-1]


def only(kind: type, events: list[AgentEvent]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def history_fault(messages: Sequence[dict[str, Any]]) -> str:
    """Why a strict server refuses a conversation in OpenAI's form; empty when it does not."""
    open_calls: list[str] = []
    seen: set[str] = set()
    for message in messages:
        message["content"] is None or message["content"].encode()
        if message["role"] == "tool":
            if message["tool_call_id"] not in open_calls:
                return "a tool message answers no open call"
            open_calls.remove(message["tool_call_id"])
            continue
        if open_calls:
            return "a call has no tool message"
        calls = message.get("tool_calls") or ()
        if message["role"] == "assistant" and not calls and not message["content"]:
            return "an assistant turn is empty"
        for call in calls:
            fault = _call_fault(call, seen)
            if fault:
                return fault
            seen.add(call["id"])
            open_calls.append(call["id"])
    return "a call has no tool message" if open_calls else ""


def _call_fault(call: dict[str, Any], seen: set[str]) -> str:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except ValueError as error:
        return f"arguments are not JSON: {error}"
    if not isinstance(arguments, dict):
        return "arguments are not an object"
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", function["name"]):
        return "a name does not match the pattern"
    if not call["id"] or call["id"] in seen:
        return "an id is empty or not unique"
    json.dumps(call, ensure_ascii=False).encode()
    return ""


def as_openai(params: CompletionParams) -> list[dict[str, Any]]:
    """The messages of a question in OpenAI's form."""
    return [
        {
            "role": each.role,
            "content": each.content,
            "tool_call_id": each.tool_call_id,
            "tool_calls": [
                {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                for call in each.tool_calls
            ],
        }
        for each in params.messages
    ]
