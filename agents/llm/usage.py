"""What a model says its answer took, as far as it can be believed."""

from typing import Any

import msgspec

from loom.schemas.llm import Usage

MOST = 2**53
"""Tokens no answer takes; the greatest number every reader of JSON agrees on."""


def usage_of(told: Any) -> Usage | None:
    """Return the usage in any object with `prompt_tokens` and `completion_tokens`.

    None when these are no counts, or all zeros, as some servers say that do not count: the caller estimates.
    """
    counts = {name: getattr(told, name, None) or 0 for name in ("prompt_tokens", "completion_tokens")}
    try:
        usage = msgspec.convert(counts, Usage)
    except msgspec.ValidationError:
        return None
    return usage if 0 < usage.total_tokens < MOST else None
