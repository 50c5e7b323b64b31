"""Values of tools as results for a model."""

from collections.abc import Mapping
from typing import Any

from loom.agents.tools.context import ToolResult
from loom.agents.values import to_text
from loom.schemas.base import cut_utf8

MAX_RESULT_BYTES = 16 * 1024
"""Most a model gets to see of one result."""
MAX_LABEL_CHARS = 200


def as_result(value: Any) -> ToolResult:
    """Return a tool's value as a result, cut to what a model gets to see.

    Raises:
        NotText: It is neither text nor JSON.
    """
    if isinstance(value, ToolResult):
        published = None if value.published is None else to_text(value.published)
        return ToolResult(cut(value.text), failed=bool(value.failed), published=published)
    return ToolResult(cut(value))


def as_result_with_parts(value: Any) -> ToolResult:
    """Return the value of a tool server as a result: content in parts becomes text.

    A text part stays; an image, audio or binary resource becomes a placeholder such as `[image: image/png, 68 bytes]`.
    The parts are a list, or the `content` of an object or dict, with `isError` beside them, as in the Model Context
    Protocol. Any other value is treated as that of a function.

    Raises:
        NotText: It is neither text nor JSON.
    """
    parts = value if isinstance(value, list) else _fact(value, "content")
    if not isinstance(parts, list) or not all(isinstance(_fact(part, "type"), str) for part in parts):
        return as_result(value)
    structured = _fact(value, "structuredContent", "structured_content")
    texts = [_text_of_part(part) for part in parts]
    if not texts and structured is not None:
        texts = [to_text(structured)]
    failed = bool(_fact(value, "isError", "is_error"))
    # The error's text is that of an exception as a rule: the model needs it, the bus does not get it.
    return ToolResult(cut("\n".join(texts)), failed=failed, published="Error: the tool failed" if failed else None)


def cut(value: Any) -> str:
    """Return a tool's value as text a model gets to see; of a long text only as much is read.

    Raises:
        NotText: It is neither text nor JSON.
    """
    text = to_text(value[:MAX_RESULT_BYTES] if isinstance(value, str) else value)
    size = len(value) if isinstance(value, str) else len(text)
    kept, was_cut = cut_utf8(text, MAX_RESULT_BYTES)
    return f"{kept}\n[cut: {size} characters in all]" if was_cut or size > len(text) else kept


def _text_of_part(part: Any) -> str:
    kind = str(_fact(part, "type"))
    if kind == "text":
        return to_text(_fact(part, "text") or "")
    inner = _fact(part, "resource") if kind == "resource" else part
    text = _fact(inner, "text")
    if kind == "resource" and isinstance(text, str):
        return to_text(text)
    return _placeholder(kind, inner)


def _placeholder(kind: str, part: Any) -> str:
    facts = [str(fact) for fact in (_fact(part, "uri"), _fact(part, "mimeType", "mime_type")) if fact]
    data = _fact(part, "data", "blob")
    if isinstance(data, str):
        facts.append(f"{len(data) * 3 // 4 - data[-2:].count('=')} bytes")
    label = f"{kind}: {', '.join(facts)}" if facts else kind
    return f"[{' '.join(to_text(label).split())[:MAX_LABEL_CHARS]}]"


def _fact(value: Any, *names: str) -> Any:
    """The first of the named facts of an object or a dict; None without any."""
    for name in names:
        found = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
        if found is not None:
            return found
    return None
