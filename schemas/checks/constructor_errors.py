"""Errors of constructor calls with wrong arguments: one sentence with the correction."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from loom.schemas.text.nearest_name import unknown_field

T = TypeVar("T")

MAIN_FIELDS = ("description", "model")
"""The field that a single positional argument probably is."""


def call_fault(name: str, fields: Sequence[str], args: Sequence[Any], given: Mapping[str, Any]) -> str | None:
    """Return the error of a call with positional or unknown arguments; None if it has neither."""
    if args:
        main = next((field for field in MAIN_FIELDS if field in fields), fields[0])
        return f"{name} takes its fields by name: write {name}({main}=…)"
    unknown = next((field for field in given if field not in fields), None)
    return None if unknown is None else f"{name} has no field `{unknown}`; {unknown_field(unknown, fields)}"


class FieldsByName(msgspec.StructMeta):
    """Metaclass of messages that people build in Python; decoding does not pass through it."""

    if not TYPE_CHECKING:  # type checkers read the fields' own signature

        def __call__(self, *args: Any, **given: Any) -> Any:
            """Build the message.

            Raises:
                TypeError: An argument is positional, or the field does not exist.
            """
            try:
                return super().__call__(*args, **given)
            except TypeError:
                fault = call_fault(self.__name__, self.__struct_fields__, args, given)
                if fault is None:
                    raise
                raise TypeError(fault) from None


def fields_by_name(cls: type[T]) -> type[T]:
    """Decorate a keyword-only dataclass: wrong calls raise TypeError with the same sentences."""
    init: Callable[..., None] = cls.__init__

    @wraps(init)
    def checked(self: T, *args: Any, **given: Any) -> None:
        fault = call_fault(cls.__name__, tuple(cls.__dataclass_fields__), args, given)  # type: ignore[attr-defined]
        if fault is not None:
            raise TypeError(fault)
        init(self, **given)

    cls.__init__ = checked  # type: ignore[assignment]
    return cls
