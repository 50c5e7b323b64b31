"""What an agent yields, read as events."""

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from msgspec import Struct, structs
from msgspec.structs import replace

from loom.agents.user_code import contain
from loom.agents.values import NotText, to_json, to_text
from loom.schemas.base import MAX_CONTENT_BYTES, Undecodable, decode, encode
from loom.schemas.errors import AgentFailed
from loom.schemas.events import AgentEvent, Done, ReasoningDelta, TextDelta

DELTA_CHARS = 4096
"""Most characters of one TextDelta cut from a text that came whole."""
EVENTS: tuple[type, ...] = get_args(AgentEvent)
# By their exact class: isinstance of a Struct that is another one takes a microsecond.
AS_THEY_ARE = frozenset(EVENTS) - {TextDelta, ReasoningDelta, Done}
"""Events whose fields are checked and not changed."""
TYPES = frozenset(str(each.__struct_config__.tag) for each in EVENTS)  # type: ignore[attr-defined]
"""The `type` of each event in JSON."""


def deltas(text: str) -> tuple[TextDelta, ...]:
    """Return `text` in pieces, as far as a result may carry it."""
    if 0 < len(text) <= DELTA_CHARS:
        return (TextDelta(text=text),)
    starts = range(0, min(len(text), MAX_CONTENT_BYTES), DELTA_CHARS)
    return tuple(TextDelta(text=text[start : start + DELTA_CHARS]) for start in starts)


def events_of(item: Any) -> Iterable[AgentEvent]:
    """Return what an agent's stream has yielded as events: an event, a mapping with an event's `type`, or text.

    Text is made fit for UTF-8, and a long one cut into pieces.

    Raises:
        AgentFailed: It is something else, or an event with a field of the wrong type.
    """
    if type(item) is TextDelta and type(item.text) is str and item.text.isascii() and len(item.text) <= DELTA_CHARS:
        return (item,)
    try:
        with contain():
            return (_checked(item, type(item).__name__),) if type(item) in AS_THEY_ARE else _read(item)
    except NotText as error:
        raise AgentFailed(f"the agent's answer is not text: {error}") from error


def _read(item: Any) -> Iterable[AgentEvent]:
    if isinstance(item, str):
        return deltas(to_text(item))
    if isinstance(item, TextDelta) and isinstance(item.text, str):
        return deltas(to_text(item.text))
    if isinstance(item, ReasoningDelta) and isinstance(item.text, str):
        return (replace(item, text=to_text(item.text)[:MAX_CONTENT_BYTES]),)
    if isinstance(item, Done):
        return (replace(item, content=_text(item.content)),)
    if isinstance(item, EVENTS):
        return (_checked(item, type(item).__name__),)
    event = event_in(item)
    if event is not item:
        return deltas(event.text) if isinstance(event, TextDelta) else (event,)
    raise AgentFailed(
        f"the agent yielded a {type(item).__name__}: it must yield text or events such as TextDelta and Done"
    )


def event_in(item: Any) -> Any:
    """Return the event that a mapping with an event's `type` stands for, and anything else as it is.

    Raises:
        AgentFailed: It has a field of the wrong type.
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
    """An answer's content, of which a result carries no more than this."""
    return to_text(content[: MAX_CONTENT_BYTES + 1] if isinstance(content, str) else content)


def _checked(item: Any, what: str) -> AgentEvent:
    """The event as a reader of its JSON gets it."""
    try:
        try:
            raw = encode(item)
        except (UnicodeEncodeError, TypeError):  # half a surrogate pair, or a subclass of str
            raw = encode(to_json(_fields(item)))
        return decode(raw, AgentEvent)  # type: ignore[arg-type]  # a union of types
    except Undecodable as error:
        raise AgentFailed(f"the agent yielded a {what} that cannot be sent: {error.message}") from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise AgentFailed(f"the agent yielded a {what} with a value that JSON cannot carry") from error


def _fields(item: Any) -> Any:
    if isinstance(item, Struct):
        return {**structs.asdict(item), "type": item.__struct_config__.tag}
    return item
