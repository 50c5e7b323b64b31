"""Tools: typed Python functions a model may call."""

import asyncio
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

import msgspec
from msgspec import UNSET, UnsetType

from loom.agents.user_code import NotText, call, describe, guarded, text_of, type_name
from loom.bus.log import get_logger
from loom.schemas.errors import LoomError
from loom.schemas.llm import ToolDefinition
from loom.schemas.task import is_token
from loom.schemas.wire import cut_utf8

MAX_RESULT_BYTES = 16 * 1024
"""Most a model gets to see of one result."""
MAX_DESCRIPTION_CHARS = 1024

log = get_logger()


@dataclass(frozen=True, kw_only=True)
class ToolContext:
    """For which job a tool runs; a tool gets it by annotating a parameter with this class."""

    task_id: str
    attempt: int
    remaining_s: float
    """Seconds the job has left as the tool starts."""
    tool_context: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """As in the agent's config."""

    @property
    def key(self) -> str:
        """`task:attempt`: recognises an effect that is being repeated."""
        return f"{self.task_id}:{self.attempt}"


@dataclass(frozen=True)
class ToolResult:
    """What a model gets to see of a call."""

    text: str
    failed: bool = False
    published: str | None = None
    """What the bus gets instead: of an exception its type alone. Absent: the text."""


class Tool:
    """A Python function as a tool: its annotations are the schema, its docstring the description.

    Args:
        fn: Sync (runs in a thread) or async; its parameters can be given by keyword.
        name: A token; default the function's name.
        timeout_s: Seconds one call may take.

    Raises:
        LoomError: The function cannot be described to a model.
    """

    def __init__(self, fn: Callable[..., Any], *, name: str | None = None, timeout_s: float = 30.0) -> None:
        own_name: str = getattr(fn, "__name__", "")
        self.name = name or own_name
        if not is_token(self.name):
            raise LoomError(f"{self.name!r} cannot name a tool: give a name of letters, digits, _ and -")
        if timeout_s <= 0:
            raise LoomError(f"tool {self.name}: timeout_s must be more than 0, not {timeout_s:g}")
        self.timeout_s = timeout_s
        self._fn = fn
        self._context_name, fields = _parameters(fn, self.name)
        self._shape = msgspec.defstruct(self.name, fields, kw_only=True, forbid_unknown_fields=True)
        self.definition = ToolDefinition(
            name=self.name,
            description=(inspect.getdoc(fn) or "")[:MAX_DESCRIPTION_CHARS],
            parameters=_schema(self._shape, self.name),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself, unchecked."""
        return self._fn(*args, **kwargs)

    async def run(self, arguments: str, context: ToolContext) -> ToolResult:
        """Call the function with a model's `arguments`, JSON text; whatever goes wrong becomes a text for the model."""
        try:
            values = msgspec.json.decode(arguments.strip() or "{}", type=self._shape)
        except (ValueError, RecursionError) as error:
            return self._failed(f"the arguments are not valid: {error}", context)
        given = {name: value for name, value in msgspec.structs.asdict(values).items() if value is not UNSET}
        if self._context_name:
            given[self._context_name] = context
        limit = min(self.timeout_s, context.remaining_s)
        scope = asyncio.timeout(limit)
        try:
            async with scope:
                value = await call(self._fn, **given)
                with guarded():
                    return ToolResult(_bounded(value))
        except (LoomError, NotText) as error:  # meant for people
            return self._failed(describe(error), context)
        except Exception as error:  # noqa: BLE001 - a tool may raise anything; the model gets to see it
            if isinstance(error, TimeoutError) and scope.expired():
                return self._failed(f"no result within {limit:g} s", context)
            return self._failed(describe(error), context, f"the tool raised {type_name(error)}")

    def _failed(self, reason: str, context: ToolContext, published: str | None = None) -> ToolResult:
        log.warning("tool_failed", tool=self.name, task_id=context.task_id, attempt=context.attempt, reason=reason)
        described = None if published is None else f"Error: {published}"
        return ToolResult(_bounded(f"Error: {reason}"), failed=True, published=described)


@overload
def tool(fn: Callable[..., Any], /) -> Tool: ...


@overload
def tool(*, name: str | None = None, timeout_s: float = 30.0) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(
    fn: Callable[..., Any] | None = None, /, *, name: str | None = None, timeout_s: float = 30.0
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a Tool of a function: `@tool`, `@tool(timeout_s=5)` or `tool(function)`."""

    def make(function: Callable[..., Any]) -> Tool:
        return Tool(function, name=name, timeout_s=timeout_s)

    return make if fn is None else make(fn)


def _parameters(fn: Callable[..., Any], name: str) -> tuple[str | None, list[Any]]:
    """The parameter that wants the ToolContext, and the others as fields of a Struct."""
    try:
        parameters = inspect.signature(fn, eval_str=True).parameters.values()
    except (NameError, ValueError, TypeError, AttributeError, SyntaxError) as error:
        raise LoomError(f"tool {name}: its parameters cannot be read: {describe(error)}") from error
    context_name: str | None = None
    fields: list[Any] = []
    for each in parameters:
        if each.kind not in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY):
            raise LoomError(f"tool {name}: {each.name} cannot be given by keyword; a model names its arguments")
        kind = Any if each.annotation is each.empty else each.annotation
        if kind is ToolContext:
            context_name = each.name
        elif each.default is each.empty:
            fields.append((each.name, kind))
        else:  # left out by the model, left out of the call: Python's own default holds
            fields.append((each.name, kind | UnsetType, UNSET))
    return context_name, fields


def _schema(shape: type, name: str) -> dict[str, Any]:
    """The JSON Schema of `shape` itself, which models want on top and not behind a reference."""
    try:
        (top,), parts = msgspec.json.schema_components([shape], ref_template="#/$defs/{name}")
    except TypeError as error:
        raise LoomError(f"tool {name}: JSON cannot carry its parameters: {error}") from error
    schema = parts.pop(top["$ref"].removeprefix("#/$defs/"))
    schema.pop("title", None)
    return {**schema, "$defs": parts} if parts else schema


def _bounded(value: Any) -> str:
    """A tool's value as text a model gets to see; of a long text only as much is read."""
    text = text_of(value[:MAX_RESULT_BYTES] if isinstance(value, str) else value)
    size = len(value) if isinstance(value, str) else len(text)
    kept, was_cut = cut_utf8(text, MAX_RESULT_BYTES)
    return f"{kept}\n[cut: {size} characters in all]" if was_cut or size > len(text) else kept
