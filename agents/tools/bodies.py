"""What a tool runs: a Python function, or a call described by a type or a JSON Schema."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from loom.agents.tools.context import ToolContext, ToolResult
from loom.agents.tools.docstring import read_docstring
from loom.agents.tools.parameters import InvalidArguments, Parameters
from loom.agents.tools.result import as_result, as_result_with_parts
from loom.agents.user_code import call, contain, error_text, is_async
from loom.agents.values import from_json, json_schema, portable
from loom.schemas.base import encode
from loom.schemas.checks.pattern_bounds import OutOfBounds
from loom.schemas.checks.schema_bounds import check_schema
from loom.schemas.errors import LoomError

MAX_SCHEMA_BYTES = 64 * 1024
MAX_FAULTS = 3
"""Most faults of one call's arguments a message lists."""
MAX_FAULT_CHARS = 300
_NOT_ON_TOP = ("oneOf", "anyOf", "allOf", "enum", "not", "if", "then", "else")
"""Keywords that servers refuse on top of a tool's parameters; arguments are checked against them all the same."""


class Body(Protocol):
    """What a tool runs.

    Attributes:
        parameters: JSON Schema of the arguments, as a model gets it.
        description: For the model, where the tool has none of its own.
    """

    parameters: dict[str, Any]
    description: str

    async def run(self, arguments: str, context: ToolContext) -> ToolResult:
        """Run it with a model's arguments, JSON text.

        Raises:
            InvalidArguments: They do not fit.
            NotText: The value is neither text nor JSON.
            Exception: Whatever the code of a user raises.
        """
        ...


class FunctionBody:
    """A function whose parameters are the arguments."""

    def __init__(self, fn: Callable[..., Any], name: str) -> None:
        if inspect.isasyncgenfunction(fn):
            raise LoomError(f"tool {name}: an async generator is not a tool; return one value")
        self._fn = fn
        self.description, texts = read_docstring(fn)
        self._signature = Parameters(fn, name, texts)
        self.parameters = self._signature.schema

    async def run(self, arguments: str, context: ToolContext) -> ToolResult:
        """Run the function; a sync one, and the iteration of what it returns, in a thread."""
        given = self._signature.read(arguments)
        given.update(dict.fromkeys(self._signature.contexts, context))
        return await _run(partial(self._fn, **given), threaded=not is_async(self._fn))


class TypeBody:
    """A call that takes the arguments as an object of one type."""

    def __init__(self, kind: Any, fn: Callable[[Any, ToolContext], Any], name: str) -> None:
        self._kind, self._fn = kind, fn
        try:
            self.parameters = _as_parameters(json_schema(kind), name)
        except TypeError as error:
            raise LoomError(f"tool {name}: its parameters have no JSON Schema: {error}") from error
        self.description = self.parameters.get("description", "")

    async def run(self, arguments: str, context: ToolContext) -> ToolResult:
        """Run the call."""
        try:
            with contain():
                given = from_json(self._kind, arguments.strip() or "{}")
        except ValueError as error:
            raise InvalidArguments(str(error)) from error
        return await _run(partial(self._fn, given, context), threaded=not is_async(self._fn))


class SchemaBody:
    """A call that takes the arguments as a dict, which fits a JSON Schema."""

    def __init__(self, schema: dict[str, Any], fn: Callable[[dict[str, Any], ToolContext], Any], name: str) -> None:
        self._fn = fn
        self.description = ""
        self._check = _checker(schema, name)
        self.parameters = _as_parameters(portable(schema), name)

    async def run(self, arguments: str, context: ToolContext) -> ToolResult:
        """Run the call; a part of its value that is not text becomes a placeholder."""
        try:
            given = from_json(dict[str, Any], arguments.strip() or "{}")
        except ValueError as error:
            raise InvalidArguments(str(error)) from error
        self._check(given)
        value = await call(self._fn, given, context)
        with contain():
            return as_result_with_parts(value)


async def _run(fn: "partial[Any]", *, threaded: bool) -> ToolResult:
    """Call `fn`, which may return an awaitable; in its thread, what a sync one returns becomes text, too."""
    results: list[ToolResult] = []

    def whole() -> Any:
        value = fn()
        if inspect.isawaitable(value):
            return value
        results.append(as_result(value))
        return None

    value = await call(whole if threaded else fn)
    with contain():
        return results[0] if results else as_result(value)


def _as_parameters(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """The schema of a tool's arguments as servers want it: an object that names its properties."""
    if schema.get("type", "object") != "object":
        raise LoomError(f"tool {name}: a model gives its arguments as an object, not as {schema['type']}")
    kept = {key: value for key, value in schema.items() if key not in _NOT_ON_TOP}
    return {"type": "object", "properties": {}, **kept}


def _checker(schema: dict[str, Any], name: str) -> Callable[[dict[str, Any]], None]:
    """Return a function that raises InvalidArguments for arguments that do not fit `schema`."""
    import jsonschema_rs  # noqa: PLC0415 - most agents need none of its 10 MB

    try:
        _check_size(schema)
        check_schema(schema)
        validator = jsonschema_rs.validator_for(schema, retriever=_nothing)
    except OutOfBounds as error:
        raise LoomError(f"tool {name}: its schema {error}") from error
    except Exception as error:  # whatever a foreign library raises, the schema cannot be used
        raise LoomError(f"tool {name}: its schema cannot be used: {error_text(error)}") from error

    def check(arguments: dict[str, Any]) -> None:
        faults = []
        for fault in validator.iter_errors(arguments):
            place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault.instance_path)
            faults.append(f"{fault.message[:MAX_FAULT_CHARS]} - at `${place}`")
            if len(faults) == MAX_FAULTS:
                break
        if faults:
            raise InvalidArguments("; ".join(faults))

    return check


def _check_size(schema: dict[str, Any]) -> None:
    size = len(encode(schema))
    if size > MAX_SCHEMA_BYTES:
        raise OutOfBounds(f"is {size} bytes of JSON; at most {MAX_SCHEMA_BYTES}")


def _nothing(uri: str) -> Any:
    """A schema holds all it refers to: a tool server must not aim this process at any address."""
    raise ValueError(f"{uri} is outside of the schema")
