"""Reads the answers of servers in all known formats. Pure.

Events without choices or delta, pings and unknown fields are skipped. Text in parts, reasoning under any of its names,
refusals, tool calls and usage are kept.
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
"""A field that OpenRouter requires back with the tool calls; it is kept in `extra` of the first call."""
MAX_DETAILS = 10_000
MAX_FINISH_REASON_CHARS = 64
MAX_NESTING = 8


class Unreadable(Exception):
    """An answer has an unknown format; the text is a clause about the answer."""


class BrokeOff(Exception):
    """A stream ended before the end of the answer."""


class AnswerReader:
    """Reads one answer from its events or from one whole value."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.reasoning_field: str | None = None
        """Name of the field with the reasoning."""
        self._calls = ToolCalls()
        self._details: list[Any] = []
        self._usage: Usage | None = None
        self._index: Any = None
        self._read_choice = self._read_delta = False
        self._unknown: Any = None

    def read(self, value: Any) -> StreamChunk | None:
        """Return the chunk of an event or of a whole answer, or None if it adds no text.

        Raises:
            ErrorReply: The value is an error.
            AgentFailed: The tool calls are too many or too long.
        """
        if isinstance(value, list) and len(value) == 1:  # some servers wrap an error in a list
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
        """Return the last chunk: tool calls, usage and finish reason.

        Args:
            ended: Whether the server sent an end mark, or the answer is one whole value.
            whole: Whether the answer is one whole value.

        Raises:
            BrokeOff: There is no end mark and no finish reason.
            ErrorReply: A whole answer is an error.
            Unreadable: A whole answer has an unknown format.
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
        """Raise the error of an answer without a choice."""
        if isinstance(self._unknown, str):
            page = self._unknown.lstrip().startswith("<")
            raise Unreadable("is a web page: check base_url" if page else "could not be read: it is not JSON")
        if isinstance(self._unknown, dict) and "choices" not in self._unknown and reason_of(self._unknown):
            raise ErrorReply(self._unknown)
        raise Unreadable("could not be read: it has no choices")

    def _choice(self, choices: Any) -> dict[str, Any] | None:
        """Return the part of an event that belongs to the first choice; others are ignored."""
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                index = choice.get("index")
                if not self._read_choice:
                    self._read_choice, self._index = True, index
                if index == self._index or index is None or self._index is None:
                    return choice
        return None

    def _chunk_of(self, choice: dict[str, Any]) -> StreamChunk | None:
        """Return the chunk of a choice's delta or message, if it adds text."""
        delta, message = choice.get("delta"), choice.get("message")
        if isinstance(delta, dict):
            self._read_delta = True
            turn = delta
            self._calls.add_fragments(delta.get("tool_calls"))
        elif isinstance(message, dict) and not self._read_delta:  # some streams repeat the whole message at the end
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
    """Return the text and the reasoning of content, which is a text, a part, or a list of parts."""
    if value is None or depth == MAX_NESTING:
        return "", ""
    if isinstance(value, str):
        return to_text(value), ""
    if isinstance(value, list):
        parts = [content_of(part, depth + 1) for part in value]
        return "".join(text for text, _ in parts), "".join(reasoning for _, reasoning in parts)
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        return _part(value, depth)
    return _plain(value), ""


def _part(part: dict[str, Any], depth: int) -> tuple[str, str]:
    """Return the text and the reasoning of a part with a type; an image, for example, has neither."""
    kind = part["type"]
    if kind in ("thinking", "reasoning", "reasoning_text", "summary_text"):
        inner = next((part[name] for name in ("thinking", "reasoning", "text", "summary") if part.get(name)), None)
        return "", "".join(content_of(inner, depth + 1))
    inner = part.get("text")
    if isinstance(inner, dict):
        inner = inner.get("value")
    return (to_text(inner) if isinstance(inner, str) else ""), ""


def _plain(value: Any) -> str:
    """Return a text unchanged, and another value as JSON."""
    if value is None:
        return ""
    try:
        return to_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError):
        return ""
