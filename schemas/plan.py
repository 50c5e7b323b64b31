"""Plans of subtasks: messages, parsing of a model's answer, and the rules of every graph."""

from collections import Counter
from collections.abc import Collection, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Literal, Protocol

from msgspec import Meta

from loom.schemas.base import CheckedMessage, Count, Name, Note, Seconds, Text, Undecodable, Unit, cut_name
from loom.schemas.envelope import Envelope
from loom.schemas.errors import InvalidPlan
from loom.schemas.task import RunResult, TaskError
from loom.schemas.text.model_json import as_shape, json_values
from loom.schemas.tokens import Token

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
"""JSON Schema of a planning model's answer."""


class Subtask(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A subtask in a plan."""

    id: Token
    description: Text
    domain: Name = ""
    dependencies: Annotated[tuple[Token, ...], Meta(max_length=1000)] = ()
    estimated_complexity: Unit = 0.3
    state: Literal["waiting", "running", "succeeded", "failed", "cancelled"] = "waiting"
    child_id: Token | None = None
    grant: Count | None = None
    """Token limit; absent: no limit."""
    node_id: Token | None = None
    """Node of the result."""
    owner: Token | None = None
    """Owner of the node."""
    error: TaskError | None = None
    tokens: Count = 0
    """Tokens used, failed attempts included."""
    spent: RunResult = RunResult()
    """The same tokens, divided into prompt and completion, and the cost; content is empty."""
    duration_s: Seconds = 0.0
    """Seconds from admission to end."""


class SplitPlan(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A parked parent and the graph of its subtasks; outputs are in the records of the subtasks."""

    parent_id: Token
    state: Literal["running", "joining", "done"] = "running"
    subtasks: Annotated[tuple[Subtask, ...], Meta(max_length=1000)]
    envelope: Envelope
    """The parked parent."""
    error: TaskError | None = None
    """Why a done plan failed; absent if the parent ended for another reason."""
    note: Note = ""


class Part(Protocol):
    """A subtask of a plan, as a message or as loom-agent 0.6 has it."""

    @property
    def id(self) -> str:
        """Unique within its plan."""
        ...

    @property
    def dependencies(self) -> Sequence[str]:
        """Ids of the subtasks whose outputs it needs."""
        ...


def check_graph(subtasks: Sequence[Part]) -> None:
    """Return if ids are unique, dependencies are ids of the plan, and the graph has no cycle.

    Raises:
        InvalidPlan: A rule is broken; `field` is `subtasks`, `id` or `dependencies`.
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
    """Return the plan in a model's answer.

    The JSON is an array of subtasks or an object with `subtasks`. A code fence, prose or a reasoning block may surround
    it. Ids may be integers, and `depends_on`, `depends` and `deps` are other names of `dependencies`.

    Raises:
        InvalidPlan: The text has no plan, a field is unknown, a subtask is malformed, or `check_graph` refuses it;
            `field` names the part.
    """
    found = next((value for value in json_values(text) if _parts_in(value)), None)
    parts = _parts_in(found)
    if parts is None:
        raise InvalidPlan("the answer holds no JSON list of subtasks", field="subtasks")
    if isinstance(found, dict):
        _check_known(found, {"subtasks"}, "the plan")
    plan = tuple(_draft(part).to_subtask() for part in parts)
    check_graph(plan)
    return plan


_Number = Annotated[int, Meta(ge=0, le=10**9)]


class _Draft(CheckedMessage, frozen=True, kw_only=True):
    """A subtask in a model's answer."""

    id: Token | _Number
    description: Annotated[str, Meta(pattern=r"\S")]
    domain: Annotated[str, Meta(max_length=128)] = ""
    dependencies: tuple[Token | _Number, ...] = ()
    estimated_complexity: Unit = 0.3

    def to_subtask(self) -> Subtask:
        """Return the subtask with its ids as strings."""
        return Subtask(
            id=str(self.id),
            description=self.description,
            domain=self.domain,
            dependencies=tuple(map(str, self.dependencies)),
            estimated_complexity=self.estimated_complexity,
        )


DEPENDENCIES = "dependencies"
ALIASES = ("depends_on", "depends", "deps")
"""Other names of `dependencies`, from plans for other systems."""


def _draft(part: dict[str, Any]) -> _Draft:
    named = f"subtask {str(part.get('id', '?'))[:64]}"
    for alias in [name for name in ALIASES if name in part]:
        if DEPENDENCIES in part:
            raise InvalidPlan(f"{named} has both {DEPENDENCIES} and {alias}; give one of them", field=alias)
        part = {name: value for name, value in part.items() if name != alias} | {DEPENDENCIES: part[alias]}
    _check_known(part, _Draft.__struct_fields__, named)
    try:
        return as_shape(part, _Draft)
    except Undecodable as error:
        raise InvalidPlan(f"{named} is malformed: {error.message}", field="subtasks") from None


def _check_known(found: dict[str, Any], known: Collection[str], what: str) -> None:
    unknown = next((name for name in found if name not in known), None)
    if unknown is not None:
        name = cut_name(ascii(unknown)[1:-1])
        raise InvalidPlan(f"{what} has the unknown field {name}; known are {', '.join(sorted(known))}", field=name)


def _parts_in(value: Any) -> list[Any] | None:
    parts = value.get("subtasks") if isinstance(value, dict) else value
    return parts if isinstance(parts, list) and parts and all(isinstance(part, dict) for part in parts) else None


def _listed(names: Sequence[str]) -> str:
    """Return the first eight names, separated by commas; a plan may have a thousand."""
    return ", ".join(names[:8])
