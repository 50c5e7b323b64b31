"""Reads the token usage of a model's answer, and ignores impossible counts."""

from collections.abc import Mapping
from typing import Any

import msgspec

from loom.schemas.llm import Usage

MAX_TOKENS = 2**53
"""Number of tokens from which a count is ignored; larger integers are not exact in every JSON reader."""


def usage_of(value: Any) -> Usage | None:
    """Return the usage in a mapping or object with `prompt_tokens` and `completion_tokens`.

    None if these are not valid counts, or are all 0, as some servers send that do not count tokens.
    """
    names = ("prompt_tokens", "completion_tokens")
    fields = value if isinstance(value, Mapping) else {name: getattr(value, name, None) for name in names}
    counts = {name: fields.get(name) or 0 for name in names}
    try:
        usage = msgspec.convert(counts, Usage)
    except msgspec.ValidationError:
        return None
    return usage if 0 < usage.total_tokens < MAX_TOKENS else None
