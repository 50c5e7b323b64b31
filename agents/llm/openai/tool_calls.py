"""Assembles the tool calls of an answer from the fragments of any server. Pure.

Fragments belong to the call with the same index, and without an index to the latest call. A name starts a new call if
the call with that index has a name and complete arguments, or got its name in the same event. An id does not start a
call, because some servers send it late, or a different one with each fragment.
"""

import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import msgspec

from loom.agents.values import to_text
from loom.schemas.base import encode, free_json_fault
from loom.schemas.errors import AgentFailed
from loom.schemas.llm import ToolCall

MAX_CALLS = 128
"""Maximum number of calls of one answer."""
MAX_CALL_BYTES = 1 << 20
"""Maximum bytes of all calls of one answer."""
ID_CHARS = 9
"""Length of a generated id; some servers accept only this length."""

MAX_PARSED_BYTES = 32 << 20
"""Bytes of a call that are parsed in total to find out whether its arguments are complete."""

_KNOWN = frozenset({"index", "id", "type", "function", "name", "arguments"})


@dataclass
class _Call:
    """A call that is being assembled."""

    index: int | None
    id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    length: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    parsed_bytes: int = 0
    whole: bool | None = None
    """Whether the arguments are complete; None: unknown."""

    @property
    def arguments(self) -> str:
        self.pieces = ["".join(self.pieces)]
        return self.pieces[0]

    def is_whole(self) -> bool:
        """Return whether the arguments are complete; False after MAX_PARSED_BYTES."""
        if self.whole is None:
            last = next((piece for piece in reversed(self.pieces) if piece and not piece.isspace()), "")
            if not last.rstrip().endswith("}"):
                return False
            self.parsed_bytes += self.length
            self.whole = self.parsed_bytes <= MAX_PARSED_BYTES and _is_whole(self.arguments)
        return self.whole

    def add_arguments(self, text: str, *, whole: bool) -> None:
        # Some servers send an empty object as a placeholder before the arguments.
        if whole or (self.length == len("{}") and text and self.arguments == "{}"):
            self.pieces, self.length = [], 0
        if text:
            self.pieces.append(text)
            self.length += len(text)
            self.whole = None


@dataclass(frozen=True)
class _Fragment:
    """The content of one element of `tool_calls`."""

    index: int | None
    id: str
    name: str
    arguments: str
    whole: bool
    """Whether the arguments are an object and therefore complete."""
    extra: dict[str, Any]


class ToolCalls:
    """Assembles the tool calls of one answer."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._open: dict[int | None, _Call] = {}
        self._bytes = 0

    def add_fragments(self, value: Any) -> None:
        """Add the fragments of one event.

        Raises:
            AgentFailed: The calls are too many or too long.
        """
        named: set[int] = set()
        for fragment in _fragments(value):
            call = self._open_call(fragment, named)
            if fragment.name:
                named.add(id(call))
            self._extend(call, fragment)

    def add_whole(self, value: Any) -> None:
        """Add the calls of a whole answer, one per element.

        Raises:
            AgentFailed: The calls are too many or too long.
        """
        for fragment in _fragments(value):
            self._extend(self._start_call(fragment.index), fragment)

    def finished(self) -> tuple[ToolCall, ...]:
        """Return the calls, each with a unique id."""
        used: set[str] = set()
        calls = []
        for call in self._calls:
            if not call.name and not call.arguments:
                continue
            call_id = call.id
            while not call_id or call_id in used:
                call_id = uuid4().hex[:ID_CHARS]
            used.add(call_id)
            calls.append(
                ToolCall(id=call_id, name=call.name, arguments=plain_arguments(call.arguments), extra=call.extra)
            )
        return tuple(calls)

    def _open_call(self, fragment: _Fragment, named: Collection[int]) -> _Call:
        """Return the call of a fragment, and start one if needed."""
        latest = self._calls[-1] if self._calls else None
        call = self._open.get(fragment.index)
        if fragment.index is None and fragment.id and not fragment.name:
            call = next((known for known in self._calls if known.id == fragment.id), call)
        if call is None and latest is not None and (fragment.index is None or latest.index is None):
            call = latest if not fragment.name or fragment.index is None else None
        if call is None or _starts_call(fragment, call, id(call) in named):
            return self._start_call(fragment.index)
        return call

    def _start_call(self, index: int | None) -> _Call:
        if len(self._calls) == MAX_CALLS:
            raise AgentFailed(f"the model called more than {MAX_CALLS} tools in one answer")
        call = _Call(index)
        self._calls.append(call)
        self._open[index] = call
        return call

    def _extend(self, call: _Call, fragment: _Fragment) -> None:
        self._bytes += len(fragment.id) + len(fragment.name) + len(fragment.arguments)
        self._bytes += len(encode(fragment.extra)) if fragment.extra else 0
        if self._bytes > MAX_CALL_BYTES:
            raise AgentFailed(f"the model's tool calls are longer than {MAX_CALL_BYTES} bytes")
        call.id = call.id or fragment.id
        if not fragment.name.startswith(call.name):
            call.name += fragment.name
        elif fragment.name:  # the first name, the same name, or a longer one
            call.name = fragment.name
        if not _repeats(fragment, call):
            call.add_arguments(fragment.arguments, whole=fragment.whole)
        call.extra.update(fragment.extra)


def _starts_call(fragment: _Fragment, call: _Call, named: bool) -> bool:
    """Return whether a fragment with the index of `call` starts another call."""
    if not fragment.name or not call.name:
        return False
    if named:
        return True
    other_id = bool(fragment.id and call.id and fragment.id != call.id)
    if not call.length:
        return other_id and fragment.name != call.name
    if not call.is_whole():
        return False
    return other_id or (bool(fragment.arguments) and not _repeats(fragment, call)) or fragment.name != call.name


def _repeats(fragment: _Fragment, call: _Call) -> bool:
    """Return whether a fragment repeats a complete call."""
    same = fragment.id == call.id != "" and fragment.name == call.name != ""
    return same and len(fragment.arguments) == call.length and call.is_whole() and fragment.arguments == call.arguments


def plain_arguments(text: str) -> str:
    """Return arguments as the text of a JSON object; `null` and JSON in a JSON string are converted."""
    stripped = text.strip()
    if stripped == "null":
        return "{}"
    if stripped.startswith('"'):
        try:
            inner = msgspec.json.decode(stripped, type=str)
        except (msgspec.DecodeError, RecursionError):
            return text
        if inner.strip() in ("", "null"):
            return "{}"
        return inner if _is_whole(inner) else text
    return text


def _is_whole(arguments: str) -> bool:
    """Return whether the text is a complete JSON object."""
    if not arguments.rstrip().endswith("}"):
        return False
    try:
        return isinstance(msgspec.json.decode(arguments), dict)
    except (msgspec.DecodeError, RecursionError):
        return False


def _fragments(value: Any) -> list[_Fragment]:
    """Return the valid elements of the field `tool_calls`."""
    elements = value if isinstance(value, list) else [value]
    return [_fragment(element) for element in elements if isinstance(element, dict)]


def _fragment(element: Mapping[str, Any]) -> _Fragment:
    index, function = element.get("index"), element.get("function")
    source = function if isinstance(function, dict) else element
    arguments = source.get("arguments")
    whole = isinstance(arguments, dict | list)
    return _Fragment(
        index=index if isinstance(index, int) and not isinstance(index, bool) else None,
        id=_text(element.get("id")),
        name=_text(source.get("name")),
        arguments=to_text(json.dumps(arguments, ensure_ascii=False)) if whole else _text(arguments),
        whole=whole,
        extra={key: value for key, value in element.items() if key not in _KNOWN and _is_sendable(value)},
    )


def _is_sendable(value: Any) -> bool:
    return value is not None and free_json_fault(value, max_bytes=sys.maxsize) is None


def _text(value: Any) -> str:
    return to_text(value) if isinstance(value, str) else ""
