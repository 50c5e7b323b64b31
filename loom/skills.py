"""Skills and their triggers."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class SkillTrigger:
    """The condition under which a task needs a skill. A trigger that cannot match raises ValueError."""

    type: Literal["keyword", "pattern", "semantic", "custom"] = "keyword"
    keywords: list[str] = field(default_factory=list)
    pattern: str = ""
    """A regular expression (Python's `re`), searched without regard to case."""
    match_all: bool = False
    """Whether every keyword must occur."""
    threshold: float = 0.7
    """Least value of `evaluator` that counts as a match."""
    evaluator: Callable[[str], float] | None = None
    """semantic and custom: text -> degree of the match, 0 to 1."""

    def __post_init__(self) -> None:
        needed = {"keyword": self.keywords, "pattern": self.pattern}.get(self.type, self.evaluator)
        if not needed:
            part = {"keyword": "keywords", "pattern": "a pattern"}.get(self.type, "an evaluator")
            raise ValueError(f"a {self.type} trigger needs {part}")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"the trigger's pattern does not compile: {error}") from None


@dataclass
class Skill:
    """Instructions of which a node is made when a task needs them.

    Raises:
        ValueError: `trigger` is a dict with wrong fields.
    """

    name: str
    description: str = ""
    instructions: str = ""
    activation_level: Literal["always", "conditional", "manual"] = "conditional"
    """manual: its trigger never chooses it."""
    priority: float = 0.5
    """0 to 1; multiplied by the degree of the match."""
    trigger: SkillTrigger | None = None
    """Absent: name and description decide whether a task needs the skill. May be a dict of the trigger's fields."""
    tools: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.trigger, dict):
            try:
                self.trigger = SkillTrigger(**self.trigger)
            except TypeError as error:
                raise ValueError(f"the trigger of skill {self.name} is not a SkillTrigger: {error}") from None
