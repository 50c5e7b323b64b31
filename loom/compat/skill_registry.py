"""SkillNodeRegistry of loom-agent 0.6: skills by name, and their matches with a text."""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

from loom.skills import Skill, SkillTrigger

if TYPE_CHECKING:
    from loom.agents.tools import Tool

LEAST_MATCH = 0.3
"""Least product of priority and match of a chosen skill."""
LEAST_WORDS = 2
_COMMON = """
a an and any are at be by can do for from how i in into is it make me my of on or please some that the thi to use what
which will with write you your skill agent task
"""
COMMON = frozenset(_COMMON.split())
"""Words without meaning for a match; without a final `s`."""


class SkillNodeRegistry:
    """Skills by name, without regard to case; a later one of the same name replaces the earlier.

    Args:
        tools: Tools for the `tools` of skills, or functions to make tools of.
    """

    def __init__(self, tools: "Iterable[Tool | Callable[..., Any]]" = ()) -> None:
        self.tools = tuple(tools)
        self._skills: dict[str, Skill] = {}
        self._loaded: set[str] = set()

    @property
    def size(self) -> int:
        """Number of skills."""
        return len(self._skills)

    def register(self, skill: Skill) -> None:
        """Add `skill`, not yet loaded."""
        key = _fold(skill.name)
        self._skills[key] = skill
        self._loaded.discard(key)

    def register_all(self, skills: Iterable[Skill]) -> None:
        """Add each of `skills`."""
        for skill in skills:
            self.register(skill)

    def get(self, name: str) -> Skill | None:
        """Return the skill of that name, or None."""
        return self._skills.get(_fold(name))

    def mark_loaded(self, name: str) -> None:
        """Mark a skill as loaded: a node has it.

        Raises:
            KeyError: There is no such skill.
        """
        key = _fold(name)
        if key not in self._skills:
            raise KeyError(name)
        self._loaded.add(key)

    def is_loaded(self, name: str) -> bool:
        """Return whether a node has the skill."""
        return _fold(name) in self._loaded

    def describe_all(self) -> str:
        """Return one line per skill, `name: description`, for a prompt."""
        return "\n".join(f"{skill.name}: {skill.description}" for skill in self._skills.values())

    def find_match(self, text: str, *, required_tools: Collection[str] = ()) -> Skill | None:
        """Return the skill that matches `text` best, by triggers, otherwise by the words of skills without one.

        Only skills that name all `required_tools` are candidates.
        """
        triggered = self.find_triggered(text, required_tools=required_tools)
        return triggered or best_by_words(text, self.described(required_tools=required_tools))

    def find_triggered(self, text: str, *, required_tools: Collection[str] = ()) -> Skill | None:
        """Return the skill with the greatest product of priority and match, at least .3; the earlier one of equals."""
        rated = [
            (skill.priority * fit(skill.trigger, text), skill)
            for skill in self._candidates(required_tools)
            if skill.trigger
        ]
        best, skill = max(rated, key=lambda pair: pair[0], default=(0.0, None))
        return skill if best >= LEAST_MATCH else None

    def described(self, *, required_tools: Collection[str] = ()) -> list[Skill]:
        """Return the skills without a trigger, which name and description select."""
        return [skill for skill in self._candidates(required_tools) if skill.trigger is None]

    def _candidates(self, required_tools: Collection[str]) -> list[Skill]:
        required = set(required_tools)
        return [
            skill
            for skill in self._skills.values()
            if skill.activation_level != "manual" and required <= set(skill.tools)
        ]


def fit(trigger: SkillTrigger, text: str) -> float:
    """Return the degree to which `text` matches `trigger`, 0 to 1.

    Of keywords it is the share that occurs; with `match_all` all must occur. A pattern gives 0 or 1. The value of an
    evaluator counts from the threshold on.
    """
    if trigger.type == "keyword":
        folded = _fold(text)
        share = sum(_fold(word) in folded for word in trigger.keywords) / max(len(trigger.keywords), 1)
        return 0.0 if trigger.match_all and share < 1 else share
    if trigger.type == "pattern":
        return float(re.search(trigger.pattern, text, re.IGNORECASE) is not None)
    answer = float(trigger.evaluator(text)) if trigger.evaluator else 0.0
    return answer if answer >= trigger.threshold else 0.0


def best_by_words(text: str, skills: Iterable[Skill]) -> Skill | None:
    """Return the skill with the most words in common with `text`; None with too few.

    A word of the name counts two, one of the description one, and two are needed; the earlier one of equals.
    """
    words = _words(text)
    rated = [(2 * len(words & _words(skill.name)) + len(words & _words(skill.description)), skill) for skill in skills]
    best, chosen = max(rated, key=lambda pair: pair[0], default=(0, None))
    return chosen if best >= LEAST_WORDS else None


def _words(text: str) -> set[str]:
    """Return the meaningful words of a text without a final `s`; for Chinese each pair of characters."""
    found = set[str]()
    for word in re.findall(r"[^\W_]+", _fold(text)):
        if word.isascii():
            found |= {word.removesuffix("s")} - COMMON
        else:
            found |= {word[at : at + 2] for at in range(max(1, len(word) - 1))}
    return found


def _fold(text: str) -> str:
    """Return a text with case and full-width forms (of Chinese and Japanese keyboards) folded."""
    return unicodedata.normalize("NFKC", text).casefold().strip()
