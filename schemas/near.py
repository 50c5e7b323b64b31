"""The nearest of the domains that are known, for one that is not. Pure."""

import difflib
from collections.abc import Iterable

MOST_NAMES = 256
"""Names that are compared; of more, the first ones."""
MOST_CHARS = 64
"""Characters of a name that are compared."""
SHORT = 3
"""Characters up to which a word must resemble another more closely: law is not lab."""
ALIKE, SHORT_ALIKE = 0.65, 0.8
"""Least share of equal characters."""


def nearest_domain(domain: str, names: Iterable[str]) -> str | None:
    """Return the name that resembles `domain` most, as worded; None where none resembles it."""
    by_word: dict[str, str] = {}
    for name in names:
        if len(by_word) >= MOST_NAMES:
            break
        by_word.setdefault(_word(name), name)
    word = _word(domain)
    cutoff = SHORT_ALIKE if len(word) <= SHORT else ALIKE
    near = difflib.get_close_matches(word, by_word, n=1, cutoff=cutoff)
    return by_word[near[0]] if near else None


def _word(name: str) -> str:
    return name[:MOST_CHARS].strip().casefold()
