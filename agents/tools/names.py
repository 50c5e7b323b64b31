"""Names of tools that models accept."""

import re
from hashlib import blake2b

MAX_NAME_CHARS = 64
NAMELESS = "unnamed"

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FOREIGN = re.compile(r"[^A-Za-z0-9_-]+")


def legal_name(name: str) -> str:
    """Return a legal tool name for `name`: 1 to 64 letters, digits, `_` and `-`."""
    if _NAME.fullmatch(name):
        return name
    return _FOREIGN.sub("_", name)[:MAX_NAME_CHARS] if re.search("[A-Za-z0-9]", name) else NAMELESS


def name_of(alias: str) -> str:
    """Return the tool name for the name on a tool server; empty for an empty one.

    Spaces, dots and similar characters become `_`. A long name, or a name in another script, gets a digest, so that the
    names of a server's tools stay different.
    """
    if not alias or (alias.isascii() and len(alias) <= MAX_NAME_CHARS):
        return alias and legal_name(alias)
    digest = blake2b(alias.encode(errors="replace"), digest_size=4).hexdigest()
    return f"{legal_name(alias)[: MAX_NAME_CHARS - 9]}_{digest}"
