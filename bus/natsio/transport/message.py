"""A message as it came: read in place, its headers taken apart only when somebody asks."""

from collections.abc import Mapping
from types import MappingProxyType

NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_VERSION = "NATS/1.0"


class Msg:
    """What was received on a subject.

    Args:
        reply: Where an answer goes; empty when none is wanted.
        raw_headers: The header block as it came; empty when there is none.
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
        """By name; the server's own word, if it is one, as `Status` and `Description`. Of a repeated one the first."""
        if self._headers is None:
            self._headers = parse_headers(self.raw_headers) if self.raw_headers else NO_HEADERS
        return self._headers

    @property
    def status(self) -> str | None:
        """The server's word instead of a message: 503 nobody listens, 100 still here, 404, 408, 409; else None."""
        return self.headers.get("Status") if self.raw_headers.startswith(b"NATS/1.0 ") else None


def parse_headers(raw: bytes) -> dict[str, str]:
    """Return a header block by name; what is no header line is left out."""
    first, *lines = raw.decode(errors="replace").split("\r\n")
    headers: dict[str, str] = {}
    version, _, said = first.partition(" ")
    if version != _VERSION:
        return headers
    code, _, why = said.partition(" ")
    if code.isdigit():
        headers["Status"] = code
    if why:
        headers["Description"] = why.strip()
    for line in lines:
        name, colon, value = line.partition(":")
        if colon and name and not any(map(str.isspace, name)):
            headers.setdefault(name, value.strip())
    return headers


def format_headers(headers: Mapping[str, str]) -> bytes:
    """Return the header block that says `headers`; a line break in a value becomes a blank.

    Raises:
        ValueError: A name is empty or holds a blank, a control character or a colon.
    """
    lines = [_VERSION]
    for name, value in headers.items():
        if not name.isprintable() or not name or " " in name or ":" in name:
            raise ValueError(f"{name[:40]!r} cannot name a header")
        lines.append(f"{name}: {' '.join(value.splitlines()) if not value.isprintable() else value}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode(errors="replace")
