"""Skills, and the triggers that call for them."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class SkillTrigger:
    """When a skill is called for. One that could never match is refused with ValueError."""

    type: Literal["keyword", "pattern", "semantic", "custom"] = "keyword"
    keywords: list[str] = field(default_factory=list)
    pattern: str = ""
    """A regular expression (Python's `re`), matched anywhere, upper and lower case alike."""
    match_all: bool = False
    """Whether every keyword must occur."""
    threshold: float = 0.7
    """Least answer of `evaluator` that counts."""
    evaluator: Callable[[str], float] | None = None
    """semantic and custom: text -> how well it fits, 0 to 1."""

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
    """Instructions an agent can be given when a task calls for them.

    Raises:
        ValueError: `trigger` is a dict that does not make a SkillTrigger.
    """

    name: str
    description: str = ""
    instructions: str = ""
    activation_level: Literal["always", "conditional", "manual"] = "conditional"
    """manual: never chosen by its trigger."""
    priority: float = 0.5
    """0 to 1; weighs the trigger's match."""
    trigger: SkillTrigger | None = None
    """Absent: a task calls for the skill by its name and description. A dict of its fields does, too."""
    tools: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.trigger, dict):
            try:
                self.trigger = SkillTrigger(**self.trigger)
            except TypeError as error:
                raise ValueError(f"the trigger of skill {self.name} is not a SkillTrigger: {error}") from None
