"""Converts the values of tools into results for a model."""

from collections.abc import Mapping
from typing import Any

from loom.agents.tools.context import ToolResult
from loom.agents.values import to_text
from loom.schemas.base import cut_utf8

MAX_RESULT_BYTES = 16 * 1024
"""Maximum size of a result for a model."""
MAX_LABEL_CHARS = 200


def as_result(value: Any) -> ToolResult:
    """Return the value of a tool as a result of at most 16 KiB.

    Raises:
        NotText: The value is neither text nor JSON.
    """
    if isinstance(value, ToolResult):
        published = None if value.published is None else to_text(value.published)
        return ToolResult(cut(value.text), failed=bool(value.failed), published=published)
    return ToolResult(cut(value))


def as_result_with_parts(value: Any) -> ToolResult:
    """Return the value of a tool server as a result; content in parts is converted to text.

    The value is a list of parts, or an object or dict with `content` and `isError`, as in the Model Context Protocol.
    Text parts are kept. Images, audio and binary resources become placeholders such as `[image: image/png, 68 bytes]`.
    Any other value is treated as that of a function.

    Raises:
        NotText: The value is neither text nor JSON.
    """
    parts = value if isinstance(value, list) else _field(value, "content")
    if not isinstance(parts, list) or not all(isinstance(_field(part, "type"), str) for part in parts):
        return as_result(value)
    structured = _field(value, "structuredContent", "structured_content")
    texts = [_text_of_part(part) for part in parts]
    if not texts and structured is not None:
        texts = [to_text(structured)]
    failed = bool(_field(value, "isError", "is_error"))
    # The text of an error is usually that of an exception: the model gets it, the bus does not.
    return ToolResult(cut("\n".join(texts)), failed=failed, published="Error: the tool failed" if failed else None)


def cut(value: Any) -> str:
    """Return the value of a tool as text of at most 16 KiB; longer text is not converted.

    Raises:
        NotText: The value is neither text nor JSON.
    """
    text = to_text(value[:MAX_RESULT_BYTES] if isinstance(value, str) else value)
    size = len(value) if isinstance(value, str) else len(text)
    kept, was_cut = cut_utf8(text, MAX_RESULT_BYTES)
    return f"{kept}\n[cut: {size} characters in all]" if was_cut or size > len(text) else kept


def _text_of_part(part: Any) -> str:
    kind = str(_field(part, "type"))
    if kind == "text":
        return to_text(_field(part, "text") or "")
    inner = _field(part, "resource") if kind == "resource" else part
    text = _field(inner, "text")
    if kind == "resource" and isinstance(text, str):
        return to_text(text)
    return _placeholder(kind, inner)


def _placeholder(kind: str, part: Any) -> str:
    details = [str(detail) for detail in (_field(part, "uri"), _field(part, "mimeType", "mime_type")) if detail]
    data = _field(part, "data", "blob")
    if isinstance(data, str):
        details.append(f"{len(data) * 3 // 4 - data[-2:].count('=')} bytes")
    label = f"{kind}: {', '.join(details)}" if details else kind
    return f"[{' '.join(to_text(label).split())[:MAX_LABEL_CHARS]}]"


def _field(value: Any, *names: str) -> Any:
    """Return the first of these fields that an object or a dict has, or None."""
    for name in names:
        field = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
        if field is not None:
            return field
    return None
