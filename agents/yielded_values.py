"""Converts the values that an agent yields into events."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from msgspec import Struct, structs
from msgspec.structs import replace

from loom.agents.user_code import contain
from loom.agents.values import NotText, to_json, to_text
from loom.schemas.base import MAX_CONTENT_BYTES, Undecodable, decode, encode
from loom.schemas.errors import AgentFailed
from loom.schemas.events import AgentEvent, Done, ReasoningDelta, StepEnd, StepStart, TextDelta

DELTA_CHARS = 4096
"""Maximum length of a TextDelta that is cut from a longer text."""
EVENTS: tuple[type, ...] = get_args(AgentEvent)
# Compared by exact class: a failing isinstance check of a Struct takes a microsecond.
UNCHANGED = frozenset(EVENTS) - {TextDelta, ReasoningDelta, Done}
"""Events whose fields are checked but not changed."""
ONLY_STEP_STARTS, ONLY_STEP_ENDS = StepStart(step=1, total_steps=1), StepEnd(step=1)
"""The step events of an agent with one step, which need no check."""
TYPES = frozenset(str(event.__struct_config__.tag) for event in EVENTS)  # type: ignore[attr-defined]
"""The JSON `type` of each event."""


def deltas(text: str) -> tuple[TextDelta, ...]:
    """Return `text` as TextDeltas of up to 4,096 characters, cut at the size limit of a result."""
    if 0 < len(text) <= DELTA_CHARS:
        return (TextDelta(text=text),)
    starts = range(0, min(len(text), MAX_CONTENT_BYTES), DELTA_CHARS)
    return tuple(TextDelta(text=text[start : start + DELTA_CHARS]) for start in starts)


def events_of(item: Any) -> Sequence[AgentEvent]:
    """Return a yielded value as events.

    Text is converted to valid UTF-8, and long text is cut into pieces.

    Args:
        item: An event, a mapping with the `type` of an event, or text.

    Raises:
        AgentFailed: The value is of another type, or a field of the event has the wrong type.
    """
    if type(item) is TextDelta and type(item.text) is str and item.text.isascii() and len(item.text) <= DELTA_CHARS:
        return (item,)
    if item is ONLY_STEP_STARTS or item is ONLY_STEP_ENDS:
        return (item,)
    try:
        with contain():
            return (_checked(item, type(item).__name__),) if type(item) in UNCHANGED else _read(item)
    except NotText as error:
        raise AgentFailed(f"the agent's answer is not text: {error}") from error


def _read(item: Any) -> Sequence[AgentEvent]:
    if isinstance(item, str):
        return deltas(to_text(item))
    if isinstance(item, TextDelta) and isinstance(item.text, str):
        return deltas(to_text(item.text))
    if isinstance(item, ReasoningDelta) and isinstance(item.text, str):
        return (replace(item, text=to_text(item.text)[:MAX_CONTENT_BYTES]),)
    if isinstance(item, Done):
        content = _text(item.content)
        return (item if content is item.content else replace(item, content=content),)
    if isinstance(item, EVENTS):
        return (_checked(item, type(item).__name__),)
    event = event_in(item)
    if event is not item:
        return deltas(event.text) if isinstance(event, TextDelta) else (event,)
    raise AgentFailed(
        f"the agent yielded a {type(item).__name__}: it must yield text or events such as TextDelta and Done"
    )


def event_in(item: Any) -> Any:
    """Return a mapping with the `type` of an event as that event, and any other value unchanged.

    Raises:
        AgentFailed: A field of the event has the wrong type.
    """
    if not isinstance(item, Mapping):
        return item
    kind = item.get("type")
    if not isinstance(kind, str) or kind not in TYPES:
        return item
    fields = dict(item)
    if kind == "done" and "content" in fields:
        fields["content"] = _text(fields["content"])
    return _checked(fields, f"mapping of type {kind}")


def _text(content: Any) -> str:
    """Return the content of an answer as text; one character more than a result can hold shows that it is too long."""
    return to_text(content[: MAX_CONTENT_BYTES + 1] if isinstance(content, str) else content)


def _checked(item: Any, what: str) -> AgentEvent:
    """Encode and decode an event, so that its fields have the types that a reader gets."""
    try:
        try:
            raw = encode(item)
        except (UnicodeEncodeError, TypeError):  # half a surrogate pair, or a subclass of str
            raw = encode(to_json(_fields(item)))
        return decode(raw, AgentEvent)  # type: ignore[arg-type]  # a union of types
    except Undecodable as error:
        raise AgentFailed(f"the agent yielded a {what} that cannot be sent: {error.message}") from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise AgentFailed(f"the agent yielded a {what} with a value that JSON cannot represent") from error


def _fields(item: Any) -> Any:
    if isinstance(item, Struct):
        return {**structs.asdict(item), "type": item.__struct_config__.tag}
    return item
