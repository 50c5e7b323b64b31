"""Parses the addresses of servers in NATS_URL; error messages contain no part of their secrets."""

import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote

from loom.schemas.errors import BusUnavailable

DEFAULT_PORT = 4222
MAX_PORT = 65_535
FORM = "write it like nats://host:4222 or tls://user:password@host:4222"
ESCAPES = "in a user name, password or token write a comma as %2C, a slash as %2F, an at sign as %40, a percent as %25"

_SCHEME = re.compile(r"([^/@:]*)://")
_HOST = re.compile(r"[^\s\x00-\x1f\[\]@:/?#]+")


class _NotAnAddressError(ValueError):
    """The reason why an address cannot be parsed, without any of its text."""


class Login(NamedTuple):
    """The credentials of a client: a user and a password, or a token."""

    user: str | None = None
    password: str | None = None
    token: str | None = None


class Address(NamedTuple):
    """One server."""

    scheme: str
    """`nats` or `tls`"""
    host: str
    port: int
    login: Login | None
    shown: str
    """The address as written in NATS_URL, without credentials."""

    @property
    def netloc(self) -> str:
        """Host and port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Scheme, host and port."""
        return f"{self.scheme}://{self.netloc}"


def parse_addresses(text: str) -> tuple[Address, ...]:
    """Return the servers of a comma separated list; spaces around them and empty parts are ignored.

    Raises:
        BusUnavailable: The list is empty, or a part is not an address. The message contains nothing of the text, as
            any part of it may belong to a password.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        addresses = tuple(_parse(part, number, len(parts)) for number, part in enumerate(parts, start=1) if part)
    except _NotAnAddressError as error:
        hint = f"; {ESCAPES}" if "@" in text else ""
        raise BusUnavailable(f"{error}; {FORM}{hint}") from None
    if not addresses:
        raise BusUnavailable(f"the list of servers is empty; {FORM}")
    return addresses


def shown(addresses: Sequence[Address]) -> str:
    """Return the addresses as written, comma separated, without credentials."""
    return ",".join(address.shown for address in addresses)


def _parse(part: str, number: int, count: int) -> Address:
    which = f"server {number} of {count}" if count > 1 else "the server's address"
    scheme, rest = _without_scheme(part, which)
    userinfo, at, rest = rest.rpartition("@")
    if at and number > 1 and not scheme:  # the comma before it may belong to a password
        raise _NotAnAddressError(f"{which} has a user or token but no nats:// or tls:// before it")
    host, port_text, tail = _host_and_port(rest, which)
    if tail.strip("/"):
        raise _NotAnAddressError(f"{which} has text after its port")
    port = DEFAULT_PORT
    if port_text:
        port = int(port_text) if port_text.isascii() and port_text.isdecimal() and len(port_text) <= 5 else 0  # noqa: PLR2004
        if not 1 <= port <= MAX_PORT:
            raise _NotAnAddressError(f"the port of {which} is not a number from 1 to {MAX_PORT}")
    written = rest.removesuffix(tail) if tail else rest
    return Address(
        scheme or "nats", host, port, _login(userinfo) if at else None, f"{scheme and scheme + '://'}{written}"
    )


def _without_scheme(part: str, which: str) -> tuple[str, str]:
    """Return the scheme (empty if there is none) and the rest."""
    match = _SCHEME.match(part)
    if match is None:
        return "", part
    scheme = match[1].lower()
    if scheme in {"ws", "wss"}:
        raise _NotAnAddressError(f"{which} is a websocket, which loom does not support")
    if scheme not in {"nats", "tls"}:
        raise _NotAnAddressError(f"{which} begins with neither nats:// nor tls://")
    return scheme, part[match.end() :]


def _host_and_port(text: str, which: str) -> tuple[str, str, str]:
    """Return host, port (empty if there is none), and the rest."""
    end = next((at for at, letter in enumerate(text) if letter in "/?#"), len(text))
    text, tail = text[:end], text[end:]
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        known = bool(bracket) and re.fullmatch(r"[0-9A-Fa-f:.]+(%\w+)?", host) is not None and port[:1] in {"", ":"}
        port = port[1:]
    else:
        host, _, port = text.partition(":")
        known = _HOST.fullmatch(host) is not None and ":" not in port
    if not known:
        if not text.strip(":"):
            raise _NotAnAddressError(f"{which} has no host")
        raise _NotAnAddressError(f"{which} has no valid host; an IPv6 address needs brackets")
    return host, port, tail


def _login(userinfo: str) -> Login | None:
    user, colon, password = userinfo.partition(":")
    if colon:
        return Login(user=unquote(user), password=unquote(password))
    return Login(token=unquote(user)) if user else None


def tls_required(addresses: Sequence[Address]) -> bool:
    """Return whether any address requires TLS; then all servers do, also those that are discovered later."""
    return any(address.scheme == "tls" for address in addresses)


def logins(addresses: Sequence[Address]) -> dict[str, Login]:
    """Return the credentials of the addresses that have some, by host and port."""
    return {address.netloc: address.login for address in addresses if address.login is not None}
