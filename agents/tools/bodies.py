"""The callables of tools: a Python function, or a call described by a type or a JSON Schema."""

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
"""Maximum number of faults of a call's arguments in a message."""
MAX_FAULT_CHARS = 300
_NOT_AT_TOP_LEVEL = ("oneOf", "anyOf", "allOf", "enum", "not", "if", "then", "else")
"""Keywords that servers refuse at the top level of a schema; arguments are still checked against them."""


class Body(Protocol):
    """The interface of a tool's callable.

    Attributes:
        parameters: JSON Schema of the arguments for a model.
        description: Description for a model, if the tool has no other.
    """

    parameters: dict[str, Any]
    description: str

    async def run(self, arguments: str, context: ToolContext) -> ToolResult:
        """Call the callable.

        Args:
            arguments: Arguments of a model, as JSON text.
            context: The job and the call.

        Raises:
            InvalidArguments: The arguments do not fit the schema.
            NotText: The result is neither text nor JSON.
            Exception: User code raised it.
        """
        ...


class FunctionBody:
    """Calls a function with the arguments as its parameters."""

    def __init__(self, fn: Callable[..., Any], name: str) -> None:
        if inspect.isasyncgenfunction(fn):
            raise LoomError(f"tool {name}: an async generator is not a tool; return one value")
        self._fn = fn
        self.description, texts = read_docstring(fn)
        self._signature = Parameters(fn, name, texts)
        self.parameters = self._signature.schema

    async def run(self, arguments: str, context: ToolContext) -> ToolResult:
        """Call the function; a sync function, and the iteration over its result, run in a thread."""
        given = self._signature.read(arguments)
        given.update(dict.fromkeys(self._signature.contexts, context))
        return await _run(partial(self._fn, **given), threaded=not is_async(self._fn))


class TypeBody:
    """Calls a function with the arguments as an object of a type."""

    def __init__(self, kind: Any, fn: Callable[[Any, ToolContext], Any], name: str) -> None:
        self._kind, self._fn = kind, fn
        try:
            self.parameters = _as_parameters(json_schema(kind), name)
        except TypeError as error:
            raise LoomError(f"tool {name}: its parameters have no JSON Schema: {error}") from error
        self.description = self.parameters.get("description", "")

    async def run(self, arguments: str, context: ToolContext) -> ToolResult:
        """Call the function."""
        try:
            with contain():
                given = from_json(self._kind, arguments.strip() or "{}")
        except ValueError as error:
            raise InvalidArguments(str(error)) from error
        return await _run(partial(self._fn, given, context), threaded=not is_async(self._fn))


class SchemaBody:
    """Calls a function with the arguments as a dict that is valid under a JSON Schema."""

    def __init__(self, schema: dict[str, Any], fn: Callable[[dict[str, Any], ToolContext], Any], name: str) -> None:
        self._fn = fn
        self.description = ""
        self._check = _checker(schema, name)
        self.parameters = _as_parameters(portable(schema), name)

    async def run(self, arguments: str, context: ToolContext) -> ToolResult:
        """Call the function; parts of its result that are not text become placeholders."""
        try:
            given = from_json(dict[str, Any], arguments.strip() or "{}")
        except ValueError as error:
            raise InvalidArguments(str(error)) from error
        self._check(given)
        value = await call(self._fn, given, context)
        with contain():
            return as_result_with_parts(value)


async def _run(fn: "partial[Any]", *, threaded: bool) -> ToolResult:
    """Call `fn`, which may return an awaitable; the result of a sync function is converted to text in its thread."""
    results: list[ToolResult] = []

    def call_and_convert() -> Any:
        value = fn()
        if inspect.isawaitable(value):
            return value
        results.append(as_result(value))
        return None

    value = await call(call_and_convert if threaded else fn)
    with contain():
        return results[0] if results else as_result(value)


def _as_parameters(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a schema in the form that servers require: an object with properties."""
    if schema.get("type", "object") != "object":
        raise LoomError(f"tool {name}: the arguments of a tool are an object, not {schema['type']}")
    kept = {key: value for key, value in schema.items() if key not in _NOT_AT_TOP_LEVEL}
    return {"type": "object", "properties": {}, **kept}


def _checker(schema: dict[str, Any], name: str) -> Callable[[dict[str, Any]], None]:
    """Return a function that raises InvalidArguments for arguments that are not valid under `schema`."""
    import jsonschema_rs  # noqa: PLC0415 - most agents need none of its 10 MB

    try:
        _check_size(schema)
        check_schema(schema)
        validator = jsonschema_rs.validator_for(schema, retriever=_refuse_reference)
    except OutOfBounds as error:
        raise LoomError(f"tool {name}: its schema {error}") from error
    except Exception as error:  # the library may raise anything
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


def _refuse_reference(uri: str) -> Any:
    """Refuse references to other documents, so that a tool server cannot direct requests of this process."""
    raise ValueError(f"{uri} is outside of the schema")
