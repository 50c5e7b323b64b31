"""Plans of subtasks: what a model is asked for, how its answer is read, and the rules every graph obeys."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta

from loom.schemas.envelope import Subtask
from loom.schemas.errors import InvalidPlan
from loom.schemas.wire import Token, Unit, Wire

PLAN_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "subtasks": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "id": {"type": "string"},
                    "description": {"type": "string"},
                    "domain": {"type": "string"},
                    "dependencies": {"type": "array", "items": {"type": "string"}},
                    "estimated_complexity": {"type": "number"},
                },
                "required": ["id", "description", "domain", "dependencies", "estimated_complexity"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["subtasks"],
    "additionalProperties": False,
}
"""JSON Schema of the answer a planning model is asked for."""


class Part(Protocol):
    """Anything with an id that may wait for others."""

    @property
    def id(self) -> str:
        """Unique within its plan."""
        ...

    @property
    def dependencies(self) -> Sequence[str]:
        """Ids of the parts whose outputs it needs."""
        ...


def check_graph(subtasks: Sequence[Part]) -> None:
    """Accept a plan whose ids are unique, whose dependencies are known and which has no cycle.

    Raises:
        InvalidPlan: Saying which rule is broken and by whom; `field` is `subtasks`, `id` or `dependencies`.
    """
    if not subtasks:
        raise InvalidPlan("the plan has no subtasks", field="subtasks")
    twice = [name for name, count in Counter(part.id for part in subtasks).items() if count > 1]
    if twice:
        raise InvalidPlan(f"duplicate subtask id {_listed(twice)}", field="id")
    known = {part.id for part in subtasks}
    for part in subtasks:
        unknown = [name for name in part.dependencies if name not in known]
        if unknown:
            raise InvalidPlan(f"subtask {part.id} has the unknown dependency {_listed(unknown)}", field="dependencies")
    try:
        TopologicalSorter({part.id: part.dependencies for part in subtasks}).prepare()
    except CycleError as error:
        names = _listed(error.args[1])
        raise InvalidPlan(f"the subtasks form a cycle: {names}", field="dependencies") from None


def parse_plan(text: str) -> tuple[Subtask, ...]:
    """Return the plan in a model's answer, whole or not at all.

    The JSON may stand bare, in a code fence or amid prose, as an array of subtasks or as an object with
    `subtasks`. Ids may be whole numbers.

    Raises:
        InvalidPlan: No plan in it, a subtask is malformed, or the graph breaks a rule of `check_graph`.
    """
    found = next((parts for value in _json_values(text) if (parts := _parts_in(value))), None)
    if found is None:
        raise InvalidPlan("the answer holds no JSON list of subtasks", field="subtasks")
    try:
        drafts = msgspec.convert(found, tuple[_Draft, ...])
    except msgspec.ValidationError as error:
        raise InvalidPlan(f"malformed subtask: {error}", field="subtasks") from None
    plan = tuple(draft.to_subtask() for draft in drafts)
    check_graph(plan)
    return plan


_Number = Annotated[int, Meta(ge=0, le=10**9)]


class _Draft(Wire, frozen=True, kw_only=True):
    """A subtask as models write it."""

    id: Token | _Number
    description: Annotated[str, Meta(pattern=r"\S")]
    domain: Annotated[str, Meta(max_length=128)] = ""
    dependencies: tuple[Token | _Number, ...] = ()
    estimated_complexity: Unit = 0.3

    def to_subtask(self) -> Subtask:
        """Return the subtask with its ids as text."""
        return Subtask(
            id=str(self.id),
            description=self.description,
            domain=self.domain,
            dependencies=tuple(map(str, self.dependencies)),
            estimated_complexity=self.estimated_complexity,
        )


_decoder = json.JSONDecoder()
_OPENING = re.compile(r"[\[{]")
MAX_IN_VAIN = 256 * 1024
"""Characters read from brackets that turn out to open no JSON, 256 more for each: about 10 ms."""


def _json_values(text: str) -> Iterator[Any]:
    """Yield every JSON array and object in `text`, outermost only, in order, until too many brackets open none."""
    at, in_vain = 0, 0
    while in_vain < MAX_IN_VAIN and (opening := _OPENING.search(text, at)):
        try:
            value, at = _decoder.raw_decode(text, opening.start())
        except RecursionError:  # too deep to be a plan; trying each bracket inside would take the square of its depth
            return
        except ValueError as error:  # a bracket in prose, or a number of thousands of digits
            at = opening.end()
            in_vain += getattr(error, "pos", len(text)) - at + 256
        else:
            yield value


def _parts_in(value: Any) -> list[Any] | None:
    parts = value.get("subtasks") if isinstance(value, dict) else value
    return parts if isinstance(parts, list) and parts and all(isinstance(part, dict) for part in parts) else None


def _listed(names: Sequence[str]) -> str:
    """Name the first few; a plan may have a thousand."""
    return ", ".join(names[:8])
