"""Ads from the arguments of Python callers, and answers as values of a type."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from msgspec.structs import replace

from loom.agents.values import from_json, json_schema
from loom.schemas.base import encode
from loom.schemas.checks.ad import parse_ad
from loom.schemas.errors import InvalidTask, LoomError, RejectedResult
from loom.schemas.task import Accept, TaskAd

T = TypeVar("T")

AnyAd = TaskAd | str | Mapping[str, Any]
"""A task: an ad, a mapping of an ad's fields, or a text that describes the work."""


def ad_of(task: AnyAd) -> TaskAd:
    """Return the ad of a task.

    Raises:
        InvalidTask: A mapping breaks a rule of ads, or the argument has another type.
    """
    if isinstance(task, TaskAd):
        parts: tuple[Any, ...] = (task.accept, task.limits)
        if any(isinstance(part, Mapping) for part in parts):  # Python callers construct ads unchecked
            return _parsed({name: value for name, value in _fields(task).items() if value is not None})
        return task
    if isinstance(task, str):
        return TaskAd(description=task)
    if isinstance(task, Mapping):
        return _parsed(dict(task))
    raise InvalidTask(f"a {type(task).__name__} is not a task: give a TaskAd, a dict of its fields, or a text")


def with_schema(ad: TaskAd, kind: Any) -> TaskAd:
    """Return `ad` with the JSON Schema of a type in `accept`, unless it has a schema.

    Raises:
        LoomError: The type has no JSON Schema.
    """
    if kind is str or (ad.accept is not None and ad.accept.json_schema is not None):
        return ad
    try:
        schema = json_schema(kind)
    except TypeError as error:
        raise LoomError(f"returns={_name(kind)} cannot be used: {error}") from error
    return replace(ad, accept=replace(ad.accept or Accept(), json_schema=schema))


def as_type(content: str, kind: type[T], task_id: str) -> T:
    """Return the content of an answer as a value of a type; for `str` the content itself.

    Raises:
        RejectedResult: It is not JSON of that type.
    """
    if kind is str:
        return cast("T", content)
    try:
        return cast("T", from_json(kind, content))
    except ValueError as error:
        message = f"the answer is not a {_name(kind)}: {error}"
        raise RejectedResult(message, task_id=task_id, partial=content) from error


def _parsed(fields: dict[str, Any]) -> TaskAd:
    named = fields.get("task_id")
    task_id = named if isinstance(named, str) else ""
    try:
        raw = encode(fields)
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise InvalidTask("the task has a value that is not JSON", task_id=task_id) from None
    try:
        return parse_ad(raw)
    except InvalidTask as error:
        # With an id: the error of an ad that an agent submits is distinguished from that of its own task.
        raise InvalidTask(error.message, field=error.field, task_id=task_id) from error


def _fields(ad: TaskAd) -> dict[str, Any]:
    return {name: getattr(ad, name) for name in ad.__struct_fields__}


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)
