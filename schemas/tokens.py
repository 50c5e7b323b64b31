"""Tokens: the variable parts of NATS subjects."""

import re
import unicodedata
from functools import lru_cache
from hashlib import sha256
from typing import Annotated

import msgspec

TOKEN_PATTERN = r"[A-Za-z0-9_-]{1,64}"  # noqa: S105 - not a secret
MAX_TOKEN = 64
_TOKEN = re.compile(TOKEN_PATTERN)

Token = Annotated[str, msgspec.Meta(pattern=rf"^{TOKEN_PATTERN}\Z")]
"""A variable part of a subject."""
NodeName = Annotated[str, msgspec.Meta(pattern=rf"^(?:{TOKEN_PATTERN}\.)?{TOKEN_PATTERN}\Z")]
"""A node as people write it: `node_id` where the owner is `local`, else `owner.node_id`."""


def is_token(text: str) -> bool:
    """Return whether `text` is valid as one token of a subject."""
    return len(text) <= MAX_TOKEN and _is_token(text)


@lru_cache(maxsize=4096)
def _is_token(text: str) -> bool:
    return _TOKEN.fullmatch(text) is not None


@lru_cache(maxsize=1024)
def domain_token(domain: str) -> str:
    """Return the token of a domain in subjects and keys, such as `code` for `Code` and `x-e6f04ffbaa42` for 代码.

    It is the text in Unicode's form NFC, trimmed and in lower case. If that is not a valid token, it is `x-` and the
    first 12 hex digits of the SHA-256 of its UTF-8 bytes. docs/subjects.md has examples for other implementations.
    """
    text = unicodedata.normalize("NFC", domain).strip().lower()
    if _TOKEN.fullmatch(text):
        return text
    return "x-" + sha256(text.encode(errors="replace")).hexdigest()[:12]
