"""Annotations as msgspec reads them."""

import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from msgspec import Meta

_BOUNDS = ("gt", "ge", "lt", "le", "multiple_of", "pattern", "min_length", "max_length", "title")


class ForPydantic(type):
    """Class of the stand-ins for types that pydantic validates and msgspec would read otherwise."""

    kind: Any

    def __instancecheck__(cls, instance: object) -> bool:
        """Accept what pydantic returned."""
        return True


def for_msgspec(kind: Any) -> Any:
    """Return `kind` as msgspec reads it: metadata of other libraries as `msgspec.Meta`.

    A plain string, `typing_extensions.Doc`, pydantic's `Field` and annotated_types are such metadata. What has
    validators of pydantic, a pydantic dataclass, a dataclass, TypedDict or NamedTuple with fields of pydantic's, and a
    union with one of its models become a stand-in.
    """
    if _wants_pydantic(kind):
        return _stand_in(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        kept, *extras = arguments
        metas = tuple(extra if isinstance(extra, Meta) else Meta(**facts) for extra, facts in _facts(extras))
        return Annotated[(for_msgspec(kept), *metas)] if metas else for_msgspec(kept)
    if origin in (Union, types.UnionType):
        return Union[tuple(for_msgspec(each) for each in arguments)]  # noqa: UP007 - of as many as there are
    if isinstance(origin, type) and arguments and not any(isinstance(each, list) for each in arguments):
        return origin[tuple(each if each is ... else for_msgspec(each) for each in arguments)]  # type: ignore[index]
    return kind


def is_pydantic(kind: Any) -> bool:
    """Return whether pydantic validates `kind`, a class."""
    return hasattr(kind, "__pydantic_core_schema__") or hasattr(kind, "__get_pydantic_core_schema__")


def described_fields(kind: Any) -> Iterator[tuple[str, str, str]]:
    """Yield class name, field and description of each field whose annotation has one, in the classes `kind` names."""
    seen: set[Any] = set()
    todo = [kind]
    while todo:
        each = todo.pop()
        if get_origin(each) is Literal:
            continue
        todo.extend(get_args(each))
        owner = get_origin(each) or each
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
    """Yield each piece of metadata that means something here, and what it holds as arguments of `Meta`."""
    for extra in extras:
        facts: dict[str, Any]
        if isinstance(extra, str):
            facts = {"description": extra}
        elif isinstance(extra, Meta):
            facts = {"description": extra.description or ""}
        else:
            facts = {name: getattr(extra, name) for name in _BOUNDS if getattr(extra, name, None) is not None}
            # `documentation` is that of a typing_extensions.Doc.
            facts["description"] = getattr(extra, "description", None) or getattr(extra, "documentation", None)
        if not isinstance(facts["description"], str) or not facts["description"]:
            del facts["description"]
        if facts or isinstance(extra, Meta):
            yield extra, facts
        if isinstance(getattr(extra, "metadata", None), list):  # of a pydantic Field: its bounds, one object each
            yield from _facts(extra.metadata)


def _wants_pydantic(kind: Any) -> bool:
    """Return whether msgspec would read `kind` otherwise than pydantic, which is meant to."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return any(hasattr(extra, "__get_pydantic_core_schema__") for extra in arguments[1:])
    if origin in (Union, types.UnionType):
        members = [each for each in arguments if each is not types.NoneType]
        return len(members) > 1 and any(is_pydantic(each) for each in members)
    return isinstance(kind, type) and _is_of_pydantic_fields(kind, set())


def _is_of_pydantic_fields(kind: type, seen: set[type]) -> bool:
    """Return whether `kind` is a pydantic dataclass, or a plain class with fields that are pydantic's."""
    seen.add(kind)
    if hasattr(kind, "__dataclass_fields__") and "__pydantic_fields__" in vars(kind):
        return True
    plain = is_dataclass(kind) or _is_typed_dict(kind) or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
    todo = list(_hints(kind).values()) if plain and not is_pydantic(kind) else []
    while todo:
        each = todo.pop()
        if isinstance(each, type):
            if each not in seen and _is_of_pydantic_fields(each, seen):
                return True
        elif type(each).__module__.partition(".")[0] == "pydantic":  # a Field or a validator in an Annotated
            return True
        todo.extend(() if get_origin(each) is Literal else get_args(each))
    return False


def _is_typed_dict(kind: type) -> bool:
    """Return whether `kind` is a TypedDict that pydantic takes: before Python 3.12 not one of typing's own."""
    return (
        issubclass(kind, dict)
        and hasattr(kind, "__total__")
        and (sys.version_info >= (3, 12) or type(kind).__module__ != "typing")
    )


def _hints(kind: type) -> dict[str, Any]:
    """The annotations of a class's fields; none where they cannot be read."""
    try:
        return get_type_hints(kind, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


@cache
def _cached_stand_in(kind: Any) -> ForPydantic:
    return ForPydantic(getattr(kind, "__name__", "Value"), (), {"kind": kind})


def _stand_in(kind: Any) -> ForPydantic:
    try:
        return _cached_stand_in(kind)
    except TypeError:  # metadata that has no hash
        return _cached_stand_in.__wrapped__(kind)
