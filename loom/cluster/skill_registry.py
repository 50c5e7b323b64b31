"""The skills agents can be given, by name, and which of them a text calls for."""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

from loom.types import Skill, SkillTrigger

if TYPE_CHECKING:
    from loom.agents.tools import Tool

LEAST_MATCH = 0.3
"""Priority times fit below which a skill is not chosen."""


class SkillNodeRegistry:
    """Holds skills by name, upper and lower case alike; a later one of the same name replaces the earlier.

    Args:
        tools: What skills may name in their `tools`: Tools, or functions to make tools of.
    """

    def __init__(self, tools: "Iterable[Tool | Callable[..., Any]]" = ()) -> None:
        self.tools = tuple(tools)
        self._skills: dict[str, Skill] = {}
        self._loaded: set[str] = set()

    @property
    def size(self) -> int:
        """How many skills there are."""
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
        """Return the skill of that name, if there is one."""
        return self._skills.get(_fold(name))

    def mark_loaded(self, name: str) -> None:
        """Note that a node has been given the skill.

        Raises:
            KeyError: There is no such skill.
        """
        key = _fold(name)
        if key not in self._skills:
            raise KeyError(name)
        self._loaded.add(key)

    def is_loaded(self, name: str) -> bool:
        """Return whether a node has been given the skill."""
        return _fold(name) in self._loaded

    def describe_all(self) -> str:
        """Return one line per skill, `name: description`, for a prompt."""
        return "\n".join(f"{skill.name}: {skill.description}" for skill in self._skills.values())

    def find_match(self, text: str, *, required_tools: Collection[str] = ()) -> Skill | None:
        """Return the skill `text` calls for most: greatest priority times fit, at least .3; ties to the earlier.

        Only skills that name all `required_tools` are looked at.
        """
        required = set(required_tools)
        rated = [
            (skill.priority * fit(skill.trigger, text), skill)
            for skill in self._skills.values()
            if skill.trigger and skill.activation_level != "manual" and required <= set(skill.tools)
        ]
        best, skill = max(rated, key=lambda pair: pair[0], default=(0.0, None))
        return skill if best >= LEAST_MATCH else None


def fit(trigger: SkillTrigger, text: str) -> float:
    """Return how well `text` meets `trigger`, 0 to 1.

    Keywords count by the share that occurs, or all or nothing with `match_all`; a pattern matches or not;
    an evaluator's answer counts from the threshold on.
    """
    if trigger.type == "keyword":
        folded = _fold(text)
        share = sum(_fold(word) in folded for word in trigger.keywords) / max(len(trigger.keywords), 1)
        return 0.0 if trigger.match_all and share < 1 else share
    if trigger.type == "pattern":
        return float(re.search(trigger.pattern, text, re.IGNORECASE) is not None)
    answer = float(trigger.evaluator(text)) if trigger.evaluator else 0.0
    return answer if answer >= trigger.threshold else 0.0


def _fold(text: str) -> str:
    """Fold case, and full-width forms as Chinese and Japanese keyboards make them."""
    return unicodedata.normalize("NFKC", text).casefold().strip()
