"""Validation of ads: those that clients submit as JSON, and those that Python callers construct."""

import re

from loom.schemas.base import (
    MAX_AD_BYTES,
    MAX_CONTEXT_BYTES,
    MAX_JSON_DEPTH,
    MAX_SCHEMA_BYTES,
    CheckedMessage,
    Undecodable,
    cut_note,
    decode,
    encode,
    free_json_fault,
)
from loom.schemas.checks.labels import LABELS_RULE, are_labels
from loom.schemas.errors import InvalidTask
from loom.schemas.task import FIELD_RULES, Accept, Limits, TaskAd
from loom.schemas.text.nearest_name import unknown_field


class _StrictAccept(Accept, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Accept as a client submits it."""


class _StrictLimits(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits as a client submits them."""


class _StrictAd(TaskAd, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TaskAd as a client submits it: a misspelt field is an error."""

    accept: _StrictAccept | None = None
    limits: _StrictLimits | None = None


def parse_ad(raw: bytes) -> TaskAd:
    """Return the ad that a client submitted as JSON.

    Raises:
        InvalidTask: The ad breaks a rule; `field` names the part, if the error belongs to one.
    """
    if len(raw) > MAX_AD_BYTES:
        raise _too_large(len(raw))
    try:
        ad = decode(raw, _StrictAd, keep_unknown=False)
    except Undecodable as error:
        raise _refusal(raw, error) from None
    return check_ad(ad)


def check_ad(ad: TaskAd) -> TaskAd:
    """Return `ad` as phases decode it, if it may be submitted; Python callers construct ads unchecked.

    Raises:
        InvalidTask: The ad breaks a rule; `field` names the part.
    """
    if not isinstance(ad.accept, Accept | None):
        raise InvalidTask(f"accept must be {FIELD_RULES['accept']}", field="accept", task_id=ad.task_id)
    _check_free_json(ad)
    try:
        raw = encode(ad)
        if len(raw) > MAX_AD_BYTES:
            raise _too_large(len(raw))
        checked = decode(raw, TaskAd)
    except Undecodable as error:
        refusal = _refusal(raw, error)
        raise InvalidTask(refusal.message, field=refusal.field, task_id=ad.task_id) from None
    except (UnicodeEncodeError, TypeError) as error:
        field = _field_in(str(error))
        raise InvalidTask(f"not a valid TaskAd: {error}", field=field, task_id=ad.task_id) from None
    _check_rules(checked)
    return checked


def check_decoded_ad(ad: TaskAd, size: int) -> None:
    """Check the rules that decoding does not, for an ad that was decoded from JSON.

    Args:
        size: Bytes of the JSON, or more.

    Raises:
        InvalidTask: The ad breaks a rule; `field` names the part.
    """
    if size > MAX_AD_BYTES:
        check_ad(ad)
    else:
        _check_free_json(ad)
        _check_rules(ad)


def _check_free_json(ad: TaskAd) -> None:
    schema = ad.accept.json_schema if ad.accept else None
    for name, free, most in (("context", ad.context, MAX_CONTEXT_BYTES), ("accept", schema, MAX_SCHEMA_BYTES)):
        if free and (fault := free_json_fault(free, max_bytes=most)):
            raise InvalidTask(f"{name} {fault}", field=name, task_id=ad.task_id)
    if ad.labels and not are_labels(ad.labels):
        raise InvalidTask(f"labels must be {LABELS_RULE}", field="labels", task_id=ad.task_id)


def _check_rules(ad: TaskAd) -> None:
    if not ad.description.strip():
        raise InvalidTask("description is empty: describe the work", field="description", task_id=ad.task_id)
    if ad.tools_allowed is None:
        return
    if forbidden := set(ad.required_tools).difference(ad.tools_allowed):
        names = ", ".join(sorted(forbidden))
        message = f"required_tools has what tools_allowed lacks: {names}; add it there, or do not require it"
        raise InvalidTask(cut_note(message), field="required_tools", task_id=ad.task_id)


def _refusal(raw: bytes, error: Undecodable) -> InvalidTask:
    if not raw.strip():
        return InvalidTask("the ad is empty: send a JSON object with at least a description", field="description")
    if isinstance(error.__cause__, RecursionError):
        return InvalidTask(f"context is nested more than {MAX_JSON_DEPTH} levels deep", field="context")
    if isinstance(error.__cause__, UnicodeDecodeError):
        field = _field_not_utf8(raw)
        return InvalidTask(f"{field or 'the ad'} is not UTF-8", field=field)
    field = _field_in(error.message)
    unknown = _UNKNOWN.search(error.message)
    if unknown:
        return InvalidTask(f"unknown field `{unknown[1]}`; {unknown_field(*_place(unknown))}", field=unknown[1])
    if field in FIELD_RULES and error.message.endswith(f"`$.{field}`"):
        return InvalidTask(f"{field} must be {FIELD_RULES[field]}", field=field)
    return InvalidTask(f"not a valid TaskAd: {error.message}", field=field)


_UNKNOWN = re.compile(r"unknown field `([^`]*)`(?: - at `\$\.(\w+)`)?")


def _place(unknown: re.Match[str]) -> tuple[str, tuple[str, ...]]:
    """Return an unknown field, and the known fields at its place."""
    shapes: dict[str | None, type[CheckedMessage]] = {"accept": Accept, "limits": Limits}
    return unknown[1], shapes.get(unknown[2], TaskAd).__struct_fields__


def _too_large(size: int) -> InvalidTask:
    return InvalidTask(
        f"the ad is {size} bytes, at most {MAX_AD_BYTES}: shorten description and context, or pass them by reference",
        field="description",
    )


def _field_not_utf8(raw: bytes) -> str | None:
    """Return the last key before the first byte that is not UTF-8."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        keys = re.findall(rb'"(\w+)"\s*:', raw[: error.start])
        return keys[-1].decode() if keys else None
    return None


def _field_in(message: str) -> str | None:
    """Return the field in a message of msgspec: `$.field` in a path, or an unknown field in backticks."""
    unknown = _UNKNOWN.search(message)
    if unknown:
        return unknown.group(1)
    path = re.search(r"`\$\.([A-Za-z_]\w*)", message)
    return path.group(1) if path else None
