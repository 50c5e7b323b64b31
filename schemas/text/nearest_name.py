"""The known name that is most similar to an unknown one. Pure."""

import difflib
from collections.abc import Iterable, Sequence

MOST_NAMES = 256
"""Most names that are compared: the first."""
MOST_CHARS = 64
"""Characters of a name that are compared."""
SHORT = 3
"""Words of at most this length must be more similar: law is not lab."""
ALIKE, SHORT_ALIKE = 0.65, 0.8
"""Least share of equal characters."""
FIELDS_ALIKE = 0.75
"""The same share for names of fields: task is not task_id."""


def nearest_domain(domain: str, names: Iterable[str]) -> str | None:
    """Return the name that is most similar to `domain`; None if none is similar."""
    by_word: dict[str, str] = {}
    for name in names:
        if len(by_word) >= MOST_NAMES:
            break
        by_word.setdefault(_word(name), name)
    word = _word(domain)
    cutoff = SHORT_ALIKE if len(word) <= SHORT else ALIKE
    near = difflib.get_close_matches(word, by_word, n=1, cutoff=cutoff)
    return by_word[near[0]] if near else None


def nearest_field(field: str, names: Iterable[str]) -> str | None:
    """Return the name that was probably meant by `field`; None if none is similar."""
    near = difflib.get_close_matches(field[:MOST_CHARS], names, n=1, cutoff=FIELDS_ALIKE)
    return near[0] if near else None


def unknown_field(field: str, names: Sequence[str]) -> str:
    """Return the correction of a field that is not among `names`, as the second half of a sentence."""
    near = nearest_field(field, names)
    return f"did you mean `{near}`?" if near else f"there are: {', '.join(names)}"


def _word(name: str) -> str:
    return name[:MOST_CHARS].strip().casefold()
