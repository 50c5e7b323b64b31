"""Converts annotations into a form that msgspec reads."""

import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from msgspec import Meta

_BOUNDS = ("gt", "ge", "lt", "le", "multiple_of", "pattern", "min_length", "max_length", "title")


class ForPydantic(type):
    """Metaclass of placeholders for types that pydantic must validate, and that msgspec would read differently."""

    kind: Any

    def __instancecheck__(cls, instance: object) -> bool:
        """Accept every value, because pydantic has validated it."""
        return True


def for_msgspec(kind: Any) -> Any:
    """Return `kind` with the metadata of other libraries converted to `msgspec.Meta`.

    Such metadata is a plain string, `typing_extensions.Doc`, pydantic's `Field` and annotated_types.

    Types that pydantic must validate become a placeholder: those with pydantic validators, pydantic dataclasses, unions
    with pydantic models, and dataclasses, TypedDicts and NamedTuples with pydantic fields.
    """
    if _wants_pydantic(kind):
        return _placeholder(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        kept, *extras = arguments
        metas = tuple(extra if isinstance(extra, Meta) else Meta(**facts) for extra, facts in _facts(extras))
        return Annotated[(for_msgspec(kept), *metas)] if metas else for_msgspec(kept)
    if origin in (Union, types.UnionType):
        return Union[tuple(for_msgspec(member) for member in arguments)]  # noqa: UP007 - of any number
    if isinstance(origin, type) and arguments and not any(isinstance(argument, list) for argument in arguments):
        return origin[tuple(item if item is ... else for_msgspec(item) for item in arguments)]  # type: ignore[index]
    return kind


def is_pydantic(kind: Any) -> bool:
    """Return whether pydantic validates `kind`, a class."""
    return hasattr(kind, "__pydantic_core_schema__") or hasattr(kind, "__get_pydantic_core_schema__")


def described_fields(kind: Any) -> Iterator[tuple[str, str, str]]:
    """Yield class name, field and description of the described fields of all classes in `kind`."""
    seen: set[Any] = set()
    todo = [kind]
    while todo:
        item = todo.pop()
        if get_origin(item) is Literal:
            continue
        todo.extend(get_args(item))
        owner = get_origin(item) or item
        if not isinstance(owner, type) or owner in seen or is_pydantic(owner) or owner.__module__ == "builtins":
            continue
        seen.add(owner)
        for name, hint in _hints(owner).items():
            todo.append(hint)
            if get_origin(hint) is Annotated:
                for _, facts in _facts(get_args(hint)[1:]):
                    if "description" in facts:
                        yield owner.__name__, name, facts["description"]


def _facts(extras: Iterable[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield each piece of known metadata with its content as arguments of `Meta`."""
    for extra in extras:
        facts: dict[str, Any]
        if isinstance(extra, str):
            facts = {"description": extra}
        elif isinstance(extra, Meta):
            facts = {"description": extra.description or ""}
        else:
            facts = {name: getattr(extra, name) for name in _BOUNDS if getattr(extra, name, None) is not None}
            # `documentation` is an attribute of typing_extensions.Doc.
            facts["description"] = getattr(extra, "description", None) or getattr(extra, "documentation", None)
        if not isinstance(facts["description"], str) or not facts["description"]:
            del facts["description"]
        if facts or isinstance(extra, Meta):
            yield extra, facts
        if isinstance(getattr(extra, "metadata", None), list):  # the bounds in a pydantic Field
            yield from _facts(extra.metadata)


def _wants_pydantic(kind: Any) -> bool:
    """Return whether pydantic must validate `kind`, because msgspec would read it differently."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return any(hasattr(extra, "__get_pydantic_core_schema__") for extra in arguments[1:])
    if origin in (Union, types.UnionType):
        members = [member for member in arguments if member is not types.NoneType]
        return len(members) > 1 and any(is_pydantic(member) for member in members)
    return isinstance(kind, type) and _is_of_pydantic_fields(kind, set())


def _is_of_pydantic_fields(kind: type, seen: set[type]) -> bool:
    """Return whether `kind` is a pydantic dataclass, or a plain class with pydantic fields."""
    seen.add(kind)
    if hasattr(kind, "__dataclass_fields__") and "__pydantic_fields__" in vars(kind):
        return True
    plain = is_dataclass(kind) or _is_typed_dict(kind) or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
    todo = list(_hints(kind).values()) if plain and not is_pydantic(kind) else []
    while todo:
        item = todo.pop()
        if isinstance(item, type):
            if item not in seen and _is_of_pydantic_fields(item, seen):
                return True
        elif type(item).__module__.partition(".")[0] == "pydantic":  # a Field or a validator in an Annotated
            return True
        todo.extend(() if get_origin(item) is Literal else get_args(item))
    return False


def _is_typed_dict(kind: type) -> bool:
    """Return whether `kind` is a TypedDict that pydantic supports; before Python 3.12 not that of `typing`."""
    return (
        issubclass(kind, dict)
        and hasattr(kind, "__total__")
        and (sys.version_info >= (3, 12) or type(kind).__module__ != "typing")
    )


def _hints(kind: type) -> dict[str, Any]:
    """Return the annotations of a class; empty if they cannot be resolved."""
    try:
        return get_type_hints(kind, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


@cache
def _cached_placeholder(kind: Any) -> ForPydantic:
    return ForPydantic(getattr(kind, "__name__", "Value"), (), {"kind": kind})


def _placeholder(kind: Any) -> ForPydantic:
    try:
        return _cached_placeholder(kind)
    except TypeError:  # unhashable metadata
        return _cached_placeholder.__wrapped__(kind)
