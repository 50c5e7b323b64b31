"""Bounds of a submitter's regular expression, checked without compiling it."""

import re
from typing import Final

MAX_CHARS: Final = 1000
MAX_REPEAT: Final = 1000
"""Greatest count in braces."""
MAX_NESTING: Final = 50
"""Groups inside of each other."""
MAX_STEPS: Final = 50_000
"""Characters and sets with all repeats expanded; this number compiles in about 20 ms, at worst 0.2 s."""
CLUSTER_STEPS: Final = 10
r"""Steps of `\X` and `\R`, which compile to small patterns of their own."""

_TOKEN = re.compile(
    r"""
      (?P<run> [^\\\[()*+?{|]+ )
    | (?P<list> \\L< )
    | (?P<cluster> \\ [XR] )
    | (?P<escape> \\ (?: [pPN]\{[^}]{0,80}\} | g<[^>]{0,80}> | . | \Z ) )
    | (?P<set> \[ \^? \]? (?: \\. | \[:[\w^=-]{0,40}:\] | [^\]\\] )*+ (?: \] | \Z ) )
    | (?P<repeat> [*+?] | \{ (?= [\d,] ) (?P<least> \d* ) (?: , (?P<most> \d* ) )? \} )
    | (?P<close> \) )
    | (?P<comment> \(\?\# [^)]* \)? )
    | (?P<call> \(\? (?: R | \d | & | [+-]\d | P[>&] ) )
    | \(\? (?P<flags> [A-Za-z0-9]{0,16} (?: -[A-Za-z]{1,16} )? ) (?P<scope> [:)] )
    | (?P<open> \( (?: \? (?: P? < (?![=!]) [^>]{0,80} > | P= | \( [^)]{0,80} \) | <? [=!] | [>|] ) )? )
    | (?P<fuzzy> \{ [\d\s<=>+,deis]{0,40}? [deis] [\d\s<=>+,deis]{0,40} [:}] )
    | (?P<one> . )
    """,
    re.VERBOSE | re.DOTALL,
)
_VERBOSE = re.compile(r"\(\?[A-Za-wyz0-9]{0,16}x")
_IGNORED = re.compile(r"(\\.|\[\^?\]?(?:\\.|[^\]\\])*+(?:\]|\Z))|\s+|#[^\n]*", re.DOTALL)
"""In a verbose pattern: an escape or a set, which is kept, or white space or a comment, which is removed."""
_REFUSED_FLAGS: Final = {
    "V1": "the version 1 syntax",
    "b": "best fuzzy matches",
    "e": "enhanced fuzzy matches",
    "f": "full case folding",
    "p": "POSIX matching",
}
_UNSUPPORTED: Final = {
    "list": "a named list",
    "call": "recursion or a call of a group",
    "fuzzy": r"fuzzy matching, or a brace to be written as \{",
}


class OutOfBounds(Exception):
    """A submitter's pattern or schema exceeds a bound; the message is the end of a sentence."""


def pattern_steps(pattern: str) -> int:
    """Return the size of a regular expression with all its repeats expanded, at least 1.

    A malformed expression has a size as well; the compiler refuses it later.

    Raises:
        OutOfBounds: It exceeds a bound, or uses a feature that is not supported.
    """
    if len(pattern) > MAX_CHARS:
        raise OutOfBounds(f"has more than {MAX_CHARS} characters")
    if _VERBOSE.search(pattern):
        pattern = _IGNORED.sub(lambda found: found[1] or "", pattern)
    size = _Size()
    for token in _TOKEN.finditer(pattern):
        size.read(token)
    return size.total()


class _Size:
    """Counts the steps of a pattern, group by group."""

    def __init__(self) -> None:
        self._steps = [0]
        """Steps of each open group, the outermost first."""
        self._last = 0
        """Steps of the latest element, which a repeat multiplies."""

    def read(self, token: re.Match[str]) -> None:
        kind = token.lastgroup or ""
        if kind == "repeat":
            times = _times(token)
            self._count(self._last * (times - 1))
            self._last *= times
        elif kind == "close":
            self._close()
        elif kind == "open":
            self._open()
        elif kind == "scope":
            _check_flags(token["flags"])
            if token["scope"] == ":":
                self._open()
        elif kind in _UNSUPPORTED:
            raise OutOfBounds(f"uses {_UNSUPPORTED[kind]}; that is not supported")
        elif kind != "comment":
            self._last = CLUSTER_STEPS if kind == "cluster" else 1
            self._count(token.end() - token.start() if kind == "run" else self._last)

    def _open(self) -> None:
        self._steps.append(0)
        if len(self._steps) > MAX_NESTING + 1:
            raise OutOfBounds(f"nests more than {MAX_NESTING} groups")

    def _close(self) -> None:
        if len(self._steps) > 1:
            self._last = max(1, self._steps.pop())
            self._count(self._last)

    def total(self) -> int:
        return max(1, sum(self._steps))

    def _count(self, steps: int) -> None:
        self._steps[-1] += steps
        if self._steps[-1] > MAX_STEPS:
            raise OutOfBounds(f"has more than {MAX_STEPS} steps with its repeats written out")


def _times(repeat: re.Match[str]) -> int:
    """Return the number of copies of a repeated element, at least 1.

    Raises:
        OutOfBounds: More than 1000 copies.
    """
    counts = [text.lstrip("0") for text in (repeat["least"], repeat["most"]) if text]
    if any(len(text) > len(str(MAX_REPEAT)) or int(text or 0) > MAX_REPEAT for text in counts):
        raise OutOfBounds(f"repeats something more than {MAX_REPEAT} times")
    return max([1, *(int(text or 0) for text in counts)])


def _check_flags(flags: str) -> None:
    for flag, feature in _REFUSED_FLAGS.items():
        if flag in flags:
            raise OutOfBounds(f"asks for {feature} by a flag; that is not supported")
