"""Checks of addresses, API keys and headers from a config or the environment. Pure."""

import re
from urllib.parse import urlsplit

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def url_fault(url: object) -> str | None:
    """Return why `url` cannot be the address of a server, as a clause that follows its name, or None."""
    if not isinstance(url, str):
        return "must be a text"
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "is not a URL: write it as https://host:port/v1"
    if parts.scheme not in ("http", "https") or "//" not in url:
        return "must begin with http:// or https://"
    if not host or any(char.isspace() or not char.isprintable() for char in url):
        return "is not a URL: write it as https://host:port/v1"
    return None


def key_fault(key: object) -> str | None:
    """Return why an API key cannot be sent, as a clause that follows its name and does not contain the key, or None."""
    if not isinstance(key, str):
        return "must be a text"
    if not key.isascii() or any(char.isspace() or not char.isprintable() for char in key.strip()):
        return "contains a space, a line break, a quotation mark or another character that a key cannot have"
    return None


def header_fault(name: str, value: object) -> str | None:
    """Return why a header cannot be sent, as a clause that follows its name and does not contain the value, or None."""
    if not _HEADER_NAME.fullmatch(name):
        return "is not a valid header name"
    if not isinstance(value, str) or not value.isascii() or not value.isprintable():
        return "must be a text of printable ASCII characters"
    return None
