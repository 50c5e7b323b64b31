"""Converts a function's parameters into a tool schema, and a model's arguments into keyword arguments."""

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
"""A longer default value is left out of the schema."""


class InvalidArguments(ValueError):
    """The arguments of a model are not valid; the message names the fault."""


class Parameters:
    """The parameters of a function, without those that receive a ToolContext.

    Args:
        fn: The function of the tool.
        name: Name of the tool in messages.
        texts: Parameter -> description, for parameters without one in their annotation.

    Attributes:
        schema: JSON Schema of the arguments, an object.
        contexts: Names of the parameters that receive the ToolContext.

    Raises:
        LoomError: A parameter cannot be given by keyword, or JSON cannot represent its type.
    """

    def __init__(self, fn: Callable[..., Any], name: str, texts: Mapping[str, str]) -> None:
        self.contexts: tuple[str, ...] = ()
        self._defaults: dict[str, Callable[[], Any]] = {}
        described: dict[str, Any] = {}
        fields: list[Any] = []
        for parameter in _signature(fn, name):
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise LoomError(
                    f"tool {name}: {parameter.name} cannot be given by keyword; a model names its arguments"
                )
            if _is_context(parameter.annotation):
                self.contexts += (parameter.name,)
                continue
            kind = Any if parameter.annotation is parameter.empty else parameter.annotation
            if _mentions_context(kind):
                raise LoomError(
                    f"tool {name}: annotate {parameter.name} with ToolContext alone, not inside another type"
                )
            default, field = parameter.default, _pydantic_field(kind, parameter.default)
            if field is not None:  # in `x: int = Field(3)`, the default of the function is the Field
                kind = Annotated[kind, field] if field is default else kind
                default = field.get_default()
                if field.is_required():
                    default = parameter.empty
                else:
                    self._defaults[parameter.name] = partial(field.get_default, call_default_factory=True)
            shape = for_msgspec(_with_text(kind, texts.get(parameter.name, "")))
            if default is parameter.empty:
                fields.append((parameter.name, shape))
            else:  # left out of the call if the model leaves it out, so that the function's default applies
                optional: Any = Union[shape, UnsetType]  # noqa: UP007 - some shapes do not support `|`
                fields.append((parameter.name, optional, UNSET))
                described[parameter.name] = default
        self._shape = msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True)
        self.schema = _schema(self._shape, name)
        _add_defaults(self.schema["properties"], described)

    def read(self, arguments: str) -> dict[str, Any]:
        """Return the arguments of a model, which are JSON text, as keyword arguments.

        Raises:
            InvalidArguments: The arguments are not valid.
        """
        try:
            with contain():
                values = from_json(self._shape, arguments.strip() or "{}")
        except ValueError as error:
            raise InvalidArguments(str(error)) from error
        given = {name: made() for name, made in self._defaults.items()}
        return given | {name: value for name, value in msgspec.structs.asdict(values).items() if value is not UNSET}


def _signature(fn: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    # A module may import ToolContext only for type checkers.
    known = {} if "ToolContext" in getattr(fn, "__globals__", {}) else {"ToolContext": ToolContext}
    try:
        return list(inspect.signature(fn, eval_str=True, locals=known).parameters.values())
    except (NameError, ValueError, TypeError, AttributeError, SyntaxError) as error:
        raise LoomError(f"tool {name}: its parameters cannot be read: {error_text(error)}") from error


def _is_context(kind: Any) -> bool:
    """Return whether an annotation is ToolContext, possibly annotated or in a union."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _is_context(get_args(kind)[0])
    if origin in (Union, types.UnionType):
        return any(_is_context(item) for item in get_args(kind))
    return kind is ToolContext or kind == "ToolContext"


def _mentions_context(kind: Any) -> bool:
    return kind is ToolContext or any(_mentions_context(item) for item in get_args(kind))


def _pydantic_field(kind: Any, default: Any) -> Any:
    """Return the pydantic Field with the default of a parameter, or None."""
    extras = get_args(kind)[1:] if get_origin(kind) is Annotated and default is inspect.Parameter.empty else ()
    for item in (default, *extras):
        if hasattr(item, "is_required") and hasattr(item, "get_default"):
            return item
    return None


def _with_text(kind: Any, text: str) -> Any:
    """Return `kind` with a description, unless it has one."""
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
