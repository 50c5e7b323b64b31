"""A received message, whose headers are parsed on first access, and the format of header blocks."""

from collections.abc import Mapping
from types import MappingProxyType

from loom.schemas.errors import LoomError

NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_VERSION = "NATS/1.0"


class PayloadTooLarge(LoomError):
    """A message exceeds the server's limit; the server would close the connection for it."""

    code = "invalid_task"


class Msg:
    """A received message.

    Args:
        reply: Reply subject; empty if no reply is requested.
        data: The body.
        raw_headers: The header block as received; empty if there is none.
    """

    __slots__ = ("_headers", "data", "raw_headers", "reply", "subject")

    def __init__(self, subject: str, reply: str = "", data: bytes = b"", raw_headers: bytes = b"") -> None:
        self.subject = subject
        self.reply = reply
        self.data = data
        self.raw_headers = raw_headers
        self._headers: Mapping[str, str] | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers by name; if a header repeats, its first value.

        The status line of a control message of the server appears as `Status` and `Description`.
        """
        if self._headers is None:
            self._headers = parse_headers(self.raw_headers) if self.raw_headers else NO_HEADERS
        return self._headers

    @property
    def status(self) -> str | None:
        """Status code of a control message of the server, for example 503 (no responders) or 100 (heartbeat).

        None for other messages.
        """
        return self.headers.get("Status") if self.raw_headers.startswith(b"NATS/1.0 ") else None


def parse_headers(raw: bytes) -> dict[str, str]:
    """Return the headers of a block by name; lines that are not headers are left out."""
    first, *lines = raw.decode(errors="replace").split("\r\n")
    headers: dict[str, str] = {}
    version, _, status = first.partition(" ")
    if version != _VERSION:
        return headers
    code, _, description = status.partition(" ")
    if code.isdigit():
        headers["Status"] = code
    if description:
        headers["Description"] = description.strip()
    for line in lines:
        name, colon, value = line.partition(":")
        if colon and name and not any(map(str.isspace, name)):
            headers.setdefault(name, value.strip())
    return headers


def format_headers(headers: Mapping[str, str]) -> bytes:
    """Return the header block of `headers`; a line break in a value becomes a space.

    Raises:
        ValueError: A name is empty or contains a space, a control character or a colon.
    """
    lines = [_VERSION]
    for name, value in headers.items():
        if not name.isprintable() or not name or " " in name or ":" in name:
            raise ValueError(f"{name[:40]!r} cannot name a header")
        lines.append(f"{name}: {' '.join(value.splitlines()) if not value.isprintable() else value}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode(errors="replace")
