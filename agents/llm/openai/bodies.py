"""Parses the bodies of answers, which are server-sent events or one JSON value. Pure."""

import codecs
import json
from typing import Any

from loom.schemas.errors import AgentFailed

MAX_LINE_BYTES = 16 << 20
"""Maximum bytes of a line or of a whole body; a longer one fails."""
MAX_STREAM_BYTES = 256 << 20
"""Maximum bytes of a stream."""
END = "[DONE]"
TOO_LONG = "the answer of the model's server is too long to be read"

_BROKEN = object()


class BodyReader:
    """Converts the bytes of a body into JSON values: one for each event, or one for the whole body.

    In a stream, lines that are not JSON or events are skipped. A body without any is returned as text.
    """

    def __init__(self) -> None:
        self.ended = False
        """Whether the end mark of a stream, or a whole value, has been read."""
        self.whole = False
        """Whether the body is one value."""
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("replace").decode
        self._pending: list[str] = []
        self._size = 0
        self._total = 0
        self._streams: bool | None = None
        """Whether the body is a stream of events; None before the first data."""
        self._event = ""
        self._data: list[str] = []
        self._data_size = 0

    def feed(self, data: bytes) -> list[Any]:
        """Add data and return the values that are complete with it.

        Raises:
            AgentFailed: The body is too long.
        """
        self._total += len(data)
        text = self._decode(data)
        if self._streams is None and text.strip():
            self._streams = not text.lstrip().startswith(("{", "[", "<", '"'))
        if "\n" not in text or not self._streams:
            self._keep(text)
            return []
        first, *middle, last = text.replace("\r\n", "\n").split("\n")
        lines = ["".join((*self._pending, first)), *middle]
        self._pending, self._size = [], 0
        self._keep(last)
        return [value for line in lines for value in self._line(line.rstrip("\r"))]

    def rest(self) -> list[Any]:
        """Return the remaining values at the end of the body."""
        text = "".join(self._pending)
        self._pending = []
        if self._streams:
            return [*self._line(text.strip()), *self._line("")]
        if not text.strip():
            return []
        self.ended = self.whole = True
        value = _json(text)
        if value is not _BROKEN:
            return [value]
        # Some servers send one JSON value per line.
        values = [_json(line) for line in text.splitlines() if line.strip()]
        return values if len(values) > 1 and _BROKEN not in values else [text]

    def _keep(self, text: str) -> None:
        self._pending.append(text)
        self._size += len(text)
        if self._size > MAX_LINE_BYTES or self._total > MAX_STREAM_BYTES:
            raise AgentFailed(TOO_LONG)

    def _line(self, line: str) -> list[Any]:
        """Add a line and return the values of events that it completes; an empty line completes an event."""
        if not line:
            return self._completed()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._event = value
        if name != "data":
            return []
        # Some servers omit the empty line between events; a JSON value may also span several lines.
        done = self._completed() if len(self._data) == 1 and _is_json(self._data[0]) else []
        self._data.append(value)
        self._data_size += len(value)
        if self._data_size > MAX_LINE_BYTES:
            raise AgentFailed(TOO_LONG)
        return done

    def _completed(self) -> list[Any]:
        event, data = self._event, "\n".join(self._data)
        self._event, self._data, self._data_size = "", [], 0
        if not data:
            return []
        if data.strip().startswith(END):
            self.ended = True
            return []
        value = _json(data)
        if event == "error":
            return [{"error": data if value is _BROKEN else value}]
        return [] if value is _BROKEN else [value]


def _json(text: str) -> Any:
    """Return the value of a JSON text, or _BROKEN."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _BROKEN


def _is_json(text: str) -> bool:
    return text.strip().startswith(END) or _json(text) is not _BROKEN
