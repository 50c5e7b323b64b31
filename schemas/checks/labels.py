"""Labels of a task: pairs of strings for gateways, tenants and people."""

from typing import Annotated

from msgspec import Meta

from loom.schemas.base import encode

MAX_LABELS = 16
MAX_LABELS_BYTES = 2048

Labels = Annotated[dict[str, Annotated[str, Meta(max_length=MAX_LABELS_BYTES)]], Meta(max_length=MAX_LABELS)]
"""Labels by which clients find a task again; agents do not receive them."""

LABELS_RULE = f"at most {MAX_LABELS} pairs of strings, {MAX_LABELS_BYTES} bytes of JSON in all"


def are_labels(value: object) -> bool:
    """Return whether `value` conforms to `LABELS_RULE`."""
    if not isinstance(value, dict) or len(value) > MAX_LABELS:
        return False
    texts = [*value, *value.values()]
    if not all(isinstance(text, str) and len(text) <= MAX_LABELS_BYTES for text in texts):
        return False
    try:
        return len(encode(value)) <= MAX_LABELS_BYTES
    except UnicodeEncodeError:  # half a surrogate pair
        return False
