"""Parameters of a Python function as the schema of a tool, and a model's arguments as its keyword arguments."""

import inspect
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec
from msgspec import UNSET, UnsetType

from loom.agents.tools.context import ToolContext
from loom.agents.user_code import contain, error_text
from loom.agents.values import NotText, from_json, json_schema, to_json
from loom.agents.values.annotations import for_msgspec
from loom.schemas.base import encode
from loom.schemas.errors import LoomError

MAX_DEFAULT_BYTES = 256
"""A longer default value is no part of the schema."""


class InvalidArguments(ValueError):
    """A model's arguments do not fit; the message names which and why."""


class Parameters:
    """The parameters of `fn`, those that receive a ToolContext apart.

    Args:
        texts: Parameter -> description, for those whose annotation has none.

    Attributes:
        schema: JSON Schema of the arguments, an object.
        contexts: Names of the parameters that receive the ToolContext, however it is annotated.

    Raises:
        LoomError: A parameter cannot be given by keyword, or JSON cannot carry its type.
    """

    def __init__(self, fn: Callable[..., Any], name: str, texts: Mapping[str, str]) -> None:
        self.contexts: tuple[str, ...] = ()
        self._defaults: dict[str, Callable[[], Any]] = {}
        described: dict[str, Any] = {}
        fields: list[Any] = []
        for each in _signature(fn, name):
            if each.kind not in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY):
                raise LoomError(f"tool {name}: {each.name} cannot be given by keyword; a model names its arguments")
            if _is_context(each.annotation):
                self.contexts += (each.name,)
                continue
            kind = Any if each.annotation is each.empty else each.annotation
            if _mentions_context(kind):
                raise LoomError(f"tool {name}: a ToolContext is given as {each.name} itself, not as a part of it")
            default, field = each.default, _pydantic_field(kind, each.default)
            if field is not None:  # `x: int = Field(3)`: the function's own default is the Field
                kind = Annotated[kind, field] if field is default else kind
                default = field.get_default()
                if field.is_required():
                    default = each.empty
                else:
                    self._defaults[each.name] = partial(field.get_default, call_default_factory=True)
            shape = for_msgspec(_with_text(kind, texts.get(each.name, "")))
            if default is each.empty:
                fields.append((each.name, shape))
            else:  # left out by the model, left out of the call: Python's own default holds
                fields.append((each.name, Union[shape, UnsetType], UNSET))  # noqa: UP007 - not every shape has an |
                described[each.name] = default
        self._shape = msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True)
        self.schema = _schema(self._shape, name)
        _add_defaults(self.schema["properties"], described)

    def read(self, arguments: str) -> dict[str, Any]:
        """Return a model's arguments, JSON text, as keyword arguments.

        Raises:
            InvalidArguments: They do not fit.
        """
        try:
            with contain():
                values = from_json(self._shape, arguments.strip() or "{}")
        except ValueError as error:
            raise InvalidArguments(str(error)) from error
        given = {name: made() for name, made in self._defaults.items()}
        return given | {name: value for name, value in msgspec.structs.asdict(values).items() if value is not UNSET}


def _signature(fn: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    # A module may import ToolContext for type checkers alone.
    known = {} if "ToolContext" in getattr(fn, "__globals__", {}) else {"ToolContext": ToolContext}
    try:
        return list(inspect.signature(fn, eval_str=True, locals=known).parameters.values())
    except (NameError, ValueError, TypeError, AttributeError, SyntaxError) as error:
        raise LoomError(f"tool {name}: its parameters cannot be read: {error_text(error)}") from error


def _is_context(kind: Any) -> bool:
    """Return whether an annotation is ToolContext, alone, annotated or in a union."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _is_context(get_args(kind)[0])
    if origin in (Union, types.UnionType):
        return any(_is_context(each) for each in get_args(kind))
    return kind is ToolContext or kind == "ToolContext"


def _mentions_context(kind: Any) -> bool:
    return kind is ToolContext or any(_mentions_context(each) for each in get_args(kind))


def _pydantic_field(kind: Any, default: Any) -> Any:
    """The pydantic Field that gives the default of a parameter, or None."""
    extras = get_args(kind)[1:] if get_origin(kind) is Annotated and default is inspect.Parameter.empty else ()
    for each in (default, *extras):
        if hasattr(each, "is_required") and hasattr(each, "get_default"):
            return each
    return None


def _with_text(kind: Any, text: str) -> Any:
    """`kind` with a description, which one of its own outweighs."""
    if not text:
        return kind
    if get_origin(kind) is Annotated:
        base, *extras = get_args(kind)
        return Annotated[(base, text, *extras)]
    return Annotated[kind, text]


def _schema(shape: type, name: str) -> dict[str, Any]:
    try:
        return json_schema(shape)
    except TypeError as error:
        raise LoomError(f"tool {name}: its parameters have no JSON Schema: {error}") from error


def _add_defaults(properties: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    for name, value in defaults.items():
        try:
            plain = to_json(value)
        except NotText:
            continue
        if plain is not None and len(encode(plain)) <= MAX_DEFAULT_BYTES:
            properties[name]["default"] = plain
