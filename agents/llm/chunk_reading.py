"""Converts the answers and stream chunks of any provider into StreamChunks."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from loom.agents.llm.usage import usage_of
from loom.agents.values import to_text
from loom.schemas.base import MAX_MESSAGE_BYTES, encode, free_json_fault
from loom.schemas.errors import AgentFailed
from loom.schemas.llm import StreamChunk, ToolCall

TEXTS = ("reasoning", "refusal")
OTHERS = ("tool_calls", "tool_call", "usage", "finish_reason")


def read_chunk(given: Any) -> StreamChunk:
    """Return a piece of a stream as a StreamChunk.

    Args:
        given: A StreamChunk, an object or dict with its fields, or a text.

    Raises:
        AgentFailed: The piece is of another type, or a field has the wrong type.
    """
    return _read(given, "text", "a chunk of the model's stream", "a StreamChunk")


def read_result(given: Any) -> StreamChunk:
    """Return a whole answer as one StreamChunk.

    Args:
        given: A CompletionResult, an object or dict with its fields, or a text.

    Raises:
        AgentFailed: The answer is of another type, or a field has the wrong type.
    """
    return _read(given, "content", "the model's answer", "a CompletionResult")


def _read(given: Any, text_field: str, what: str, wanted: str) -> StreamChunk:
    if isinstance(given, str):
        return StreamChunk(text=to_text(given))
    fields = _fields(given)
    if not any(hasattr(fields, name) for name in (text_field, *TEXTS, *OTHERS)):
        raise AgentFailed(f"{what} is of type {type(given).__name__}: a provider gives {wanted}, or text")
    return StreamChunk(
        text=_text(fields, text_field, what),
        reasoning=_text(fields, "reasoning", what),
        refusal=_text(fields, "refusal", what),
        tool_calls=tuple(_calls(fields, what)),
        usage=usage_of(_fields(getattr(fields, "usage", None))),
        finish_reason=_text(fields, "finish_reason", what) or None,
    )


def _fields(given: Any) -> Any:
    """Return a dict as an object with its entries as attributes, and any other value unchanged."""
    if isinstance(given, Mapping):
        return SimpleNamespace(**{name: value for name, value in given.items() if isinstance(name, str)})
    return given


def _text(fields: Any, name: str, what: str) -> str:
    value = getattr(fields, name, None)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise AgentFailed(f"{what} has {name} of type {type(value).__name__}: a provider gives text, or None")
    return to_text(value)


def _calls(fields: Any, what: str) -> Iterable[ToolCall]:
    given = getattr(fields, "tool_calls", None) or ()
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise AgentFailed(f"{what} has tool_calls of type {type(given).__name__}: a provider gives a list of ToolCall")
    calls = list(given)
    single = getattr(fields, "tool_call", None)
    if single is not None and single not in calls:
        calls.append(single)
    return (_call(call, what) for call in calls)


def _call(given: Any, what: str) -> ToolCall:
    call = _fields(given)
    function = _fields(getattr(call, "function", None)) or call
    if not hasattr(function, "name"):
        raise AgentFailed(f"{what} has a call of type {type(given).__name__}: a provider gives a ToolCall")
    arguments, extra = getattr(function, "arguments", None), getattr(call, "extra", None)
    return ToolCall(
        id=_text(call, "id", what),
        name=_text(function, "name", what),
        arguments=_text(function, "arguments", what)
        if isinstance(arguments, str | None)
        else encode(arguments).decode(),
        extra=_sendable(extra),
    )


def _sendable(extra: Any) -> dict[str, Any]:
    """Return the extra fields of a call if they can be sent back as JSON, else an empty dict."""
    usable = isinstance(extra, dict) and free_json_fault(extra, max_bytes=MAX_MESSAGE_BYTES) is None
    return extra if usable else {}
