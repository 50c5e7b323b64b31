"""Adapts requests to a model, based on the refusals of its server. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loom.agents.llm.openai.refusals import Refusal

MAX_ADAPTATIONS = 8
"""Maximum number of adaptations of one request."""

_STATUSES = frozenset({400, 422})
_CODES = frozenset({"unsupported_parameter", "unsupported_value", "unknown_parameter", "extra_forbidden"})
_UNSUPPORTED = re.compile(
    r"unsupported|unrecogni[sz]ed|unknown|unexpected|deprecated|unavailable|extra (input|field|param)|only the default"
    r"|(not|n't|no longer) (be )?(currently |yet )?(support|permit|allow|accept|recogni|compatible|available)"
    r"|cannot (both )?be (used|specified|set)|at the same time|only .{1,40} (is|are) (allowed|supported|accepted)",
    re.IGNORECASE,
)
_OWN = {
    "stream_options": r"stream_options|include_usage",
    "response_format": r"response_format|response format|json_schema|json_object|structured outputs?|mime type",
    "max_tokens": r"max_tokens",
    "max_completion_tokens": r"max_completion_tokens",
    "temperature": r"temperature",
    "tool_choice": r"tool_choice",
    "reasoning_effort": r"reasoning_effort",
    "stream": r"stream|streaming",
}
"""Parameter -> pattern of its names in a refusal, in search order; the fields of `extra` come after them."""
_FIXED = frozenset({"model", "messages", "tools"})
"""Parameters that are never left out."""
_NO_SYSTEM = re.compile(r"system.{0,20} role|role.{0,40}\bsystem\b|system (message|prompt)", re.IGNORECASE)
_MISSING = re.compile(r"missing|required|must (be|have|include|contain)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Compatibility:
    """The differences between requests to a model and its configuration."""

    left_out: frozenset[str] = frozenset()
    """Parameters that are not sent."""
    completion_tokens: bool = False
    """Whether `max_tokens` is sent as `max_completion_tokens`."""
    json_object: bool = False
    """Whether the prompt describes the schema, and the response format requires only a JSON object."""
    system_as_user: bool = False
    """Whether the system prompt is prepended to the first user message."""
    reasoning_content: bool | None = None
    """Whether reasoning is sent back as `reasoning_content`; None: the server has not sent any."""


def adapt(known: Compatibility, request: Mapping[str, Any], refusal: Refusal) -> tuple[Compatibility, str] | None:
    """Return the compatibility after a refusal, and the name of the refused parameter.

    Each call removes or replaces a parameter, so that repeated calls end.

    Args:
        known: The compatibility before the refusal.
        request: The refused request.
        refusal: The error of the server.

    Returns:
        None if the refusal does not name a parameter of the request as unsupported.
    """
    if refusal.status not in _STATUSES:
        return None
    if "reasoning_content" in refusal.reason:
        return _reasoning(known, refusal)
    if refusal.code not in _CODES and not _UNSUPPORTED.search(refusal.reason):
        return None
    name = _named(request, refusal)
    if name is not None:
        return _without(known, request, name), name
    if not known.system_as_user and _NO_SYSTEM.search(f"{refusal.param} {refusal.reason}") and _has_system(request):
        return replace(known, system_as_user=True), "system"
    return None


def _reasoning(known: Compatibility, refusal: Refusal) -> tuple[Compatibility, str] | None:
    """Send reasoning back if the server requires it, and leave it out if the server refuses it."""
    required = bool(_MISSING.search(refusal.reason))
    if (required and known.reasoning_content is None) or (not required and known.reasoning_content):
        return replace(known, reasoning_content=required), "reasoning_content"
    return None


def _named(request: Mapping[str, Any], refusal: Refusal) -> str | None:
    """Return the parameter of the request that a refusal names, or None."""
    root = re.split(r"[.\[]", refusal.param)[0]
    if root in request:
        return None if root in _FIXED else root
    extra = {name: re.escape(name) for name in request if name not in _OWN and name not in _FIXED}
    for name, words in (_OWN | extra).items():
        if name in request and re.search(rf"(?<![\w])({words})(?![\w])", refusal.reason, re.IGNORECASE):
            return name
    return None


def _without(known: Compatibility, request: Mapping[str, Any], name: str) -> Compatibility:
    """Return the compatibility with a simpler form of a parameter, or without the parameter."""
    if name == "max_tokens" and not known.completion_tokens:
        return replace(known, completion_tokens=True)
    if name == "response_format" and _type(request[name]) == "json_schema" and not known.json_object:
        return replace(known, json_object=True)
    names = {name, "stream_options"} if name == "stream" else {name}
    return replace(known, left_out=known.left_out | names)


def _type(response_format: Any) -> Any:
    return response_format.get("type") if isinstance(response_format, Mapping) else None


def _has_system(request: Mapping[str, Any]) -> bool:
    return any(message.get("role") == "system" for message in request["messages"])
