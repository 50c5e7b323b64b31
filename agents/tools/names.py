"""Names under which models may call tools."""

import re
from hashlib import blake2b

MAX_NAME_CHARS = 64
NAMELESS = "unnamed"

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FOREIGN = re.compile(r"[^A-Za-z0-9_-]+")


def legal_name(name: str) -> str:
    """Return `name` as a tool may be called: 1 to 64 letters, digits, `_` and `-`."""
    if _NAME.fullmatch(name):
        return name
    return _FOREIGN.sub("_", name)[:MAX_NAME_CHARS] if re.search("[A-Za-z0-9]", name) else NAMELESS


def name_of(alias: str) -> str:
    """Return the name for a tool that its server names `alias`; empty for an empty one.

    Spaces, dots and the like become `_`. A name in another script, or a long one, gets a digest, so that two of a
    server's tools do not share a name.
    """
    if not alias or (alias.isascii() and len(alias) <= MAX_NAME_CHARS):
        return alias and legal_name(alias)
    digest = blake2b(alias.encode(errors="replace"), digest_size=4).hexdigest()
    return f"{legal_name(alias)[: MAX_NAME_CHARS - 9]}_{digest}"
