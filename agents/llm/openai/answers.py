"""Answers of a server, read whatever their form. Pure.

What carries nothing is skipped: events without choices or delta, pings, unknown fields. What is there is kept: text
in parts, reasoning under any of its names, a refusal, calls, usage.
"""

import json
from typing import Any, NoReturn

from msgspec import structs

from loom.agents.llm.openai.refusals import ErrorReply, reason_of
from loom.agents.llm.openai.tool_calls import MAX_CALL_BYTES, ToolCalls
from loom.agents.llm.usage import usage_of
from loom.agents.values import to_text
from loom.schemas.base import free_json_fault
from loom.schemas.llm import StreamChunk, Usage

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
REASONING_DETAILS = "reasoning_details"
"""A field of a message that OpenRouter wants back with its calls; kept beside the first of them."""
MAX_DETAILS = 10_000
MAX_FINISH_REASON_CHARS = 64
MAX_NESTING = 8


class Unreadable(Exception):
    """An answer holds nothing that is known; its text is a clause about the answer."""


class BrokeOff(Exception):
    """A stream ended before the answer did."""


class AnswerReader:
    """Reads one answer, from events or from a whole value."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.reasoning_field: str | None = None
        """The field that reasoning came in."""
        self._calls = ToolCalls()
        self._details: list[Any] = []
        self._usage: Usage | None = None
        self._index: Any = None
        self._read_choice = self._read_delta = False
        self._unknown: Any = None

    def read(self, value: Any) -> StreamChunk | None:
        """Return what an event or a whole answer adds; None: nothing yet.

        Raises:
            ErrorReply: It is an error instead.
            AgentFailed: The calls are too many or too long.
        """
        if isinstance(value, list) and len(value) == 1:  # as some servers wrap an error
            value = value[0]
        if not isinstance(value, dict):
            self._unknown = value
            return None
        if value.get("error") or value.get("object") == "error":
            raise ErrorReply(value)
        self._usage = usage_of(value.get("usage")) or self._usage
        choice = self._choice(value.get("choices"))
        if choice is None:
            self._unknown = value
            return None
        self._usage = usage_of(choice.get("usage")) or self._usage
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self.finish_reason = to_text(reason[:MAX_FINISH_REASON_CHARS])
        return self._chunk_of(choice)

    def last(self, *, ended: bool, whole: bool) -> StreamChunk:
        """Return the last chunk: calls, usage and finish reason.

        Args:
            ended: Whether the server marked the end, or the answer came whole.
            whole: Whether it came whole.

        Raises:
            BrokeOff: There is neither an end mark nor a finish reason.
            ErrorReply, Unreadable: A whole answer is something else.
        """
        if whole and not self._read_choice:
            self._refuse_unknown()
        calls = self._calls.finished()
        if calls and self._details and free_json_fault(self._details, max_bytes=MAX_CALL_BYTES) is None:
            extra = {**calls[0].extra, REASONING_DETAILS: self._details}
            calls = (structs.replace(calls[0], extra=extra), *calls[1:])
        if self.finish_reason is None:
            if not ended:
                raise BrokeOff
            self.finish_reason = "tool_calls" if calls else "stop"
        return StreamChunk(tool_calls=calls, usage=self._usage, finish_reason=self.finish_reason)

    def _refuse_unknown(self) -> NoReturn:
        """Raise the error of an answer that held no choice."""
        if isinstance(self._unknown, str):
            page = self._unknown.lstrip().startswith("<")
            raise Unreadable("is a web page: check base_url" if page else "could not be read: it is not JSON")
        if isinstance(self._unknown, dict) and "choices" not in self._unknown and reason_of(self._unknown):
            raise ErrorReply(self._unknown)
        raise Unreadable("could not be read: it has no choices")

    def _choice(self, choices: Any) -> dict[str, Any] | None:
        """Return the event's part of the one choice that counts: the first."""
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                index = choice.get("index")
                if not self._read_choice:
                    self._read_choice, self._index = True, index
                if index == self._index or index is None or self._index is None:
                    return choice
        return None

    def _chunk_of(self, choice: dict[str, Any]) -> StreamChunk | None:
        """Read a choice's delta, or its message."""
        delta, message = choice.get("delta"), choice.get("message")
        if isinstance(delta, dict):
            self._read_delta = True
            turn = delta
            self._calls.add_fragments(delta.get("tool_calls"))
        elif isinstance(message, dict) and not self._read_delta:  # some streams end with the whole message again
            turn = message
            self._calls.add_whole(message.get("tool_calls"))
        else:
            turn = {"content": choice.get("text")}
        details = turn.get(REASONING_DETAILS)
        if isinstance(details, list):
            self._details.extend(details[: MAX_DETAILS - len(self._details)])
        text, thought = content_of(turn.get("content"))
        reasoning = self._reasoning(turn) + thought
        refusal = _plain(turn.get("refusal"))
        return StreamChunk(text=text, reasoning=reasoning, refusal=refusal) if text or reasoning or refusal else None

    def _reasoning(self, turn: dict[str, Any]) -> str:
        for name in REASONING_FIELDS:
            text = "".join(content_of(turn.get(name)))
            if text:
                self.reasoning_field = self.reasoning_field or name
                return text
        return ""


def content_of(value: Any, depth: int = 0) -> tuple[str, str]:
    """Return the text and the reasoning in content: a text, a part, or a list of parts."""
    if value is None or depth == MAX_NESTING:
        return "", ""
    if isinstance(value, str):
        return to_text(value), ""
    if isinstance(value, list):
        parts = [content_of(each, depth + 1) for each in value]
        return "".join(text for text, _ in parts), "".join(reasoning for _, reasoning in parts)
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        return _part(value, depth)
    return _plain(value), ""


def _part(part: dict[str, Any], depth: int) -> tuple[str, str]:
    """Return the text and the reasoning of one typed part; images and the like have none."""
    kind = part["type"]
    if kind in ("thinking", "reasoning", "reasoning_text", "summary_text"):
        inner = next((part[name] for name in ("thinking", "reasoning", "text", "summary") if part.get(name)), None)
        return "", "".join(content_of(inner, depth + 1))
    inner = part.get("text")
    if isinstance(inner, dict):
        inner = inner.get("value")
    return (to_text(inner) if isinstance(inner, str) else ""), ""


def _plain(value: Any) -> str:
    """Return a text as it is, and another value as JSON."""
    if value is None:
        return ""
    try:
        return to_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError):
        return ""
