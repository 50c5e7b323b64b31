"""The tokens that a model's answer took, as far as the count can be believed."""

from collections.abc import Mapping
from typing import Any

import msgspec

from loom.schemas.llm import Usage

MOST = 2**53
"""Tokens no answer takes; the greatest number every reader of JSON agrees on."""


def usage_of(value: Any) -> Usage | None:
    """Return the usage in a mapping or object with `prompt_tokens` and `completion_tokens`.

    None when these are no counts, or all zeros, as some servers send that do not count: the caller estimates.
    """
    names = ("prompt_tokens", "completion_tokens")
    found = value if isinstance(value, Mapping) else {name: getattr(value, name, None) for name in names}
    counts = {name: found.get(name) or 0 for name in names}
    try:
        usage = msgspec.convert(counts, Usage)
    except msgspec.ValidationError:
        return None
    return usage if 0 < usage.total_tokens < MOST else None
