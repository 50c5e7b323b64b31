"""The description of a message that could not be handled."""

from typing import Annotated

from msgspec import Meta

from loom.schemas.base import CheckedMessage, Count, Note

Subject = Annotated[str, Meta(max_length=4096)]
"""A subject, at most as long as the server accepts; a single token may be as long."""


class DeadLetter(CheckedMessage, frozen=True, kw_only=True):
    """Headers of a dead letter; its body is the raw bytes of the message."""

    phase: Subject
    task_id: Subject
    subject: Subject
    deliveries: Count
    reason: Annotated[str, Meta(max_length=1000)]
    stream_seq: Count = 0
    cut: bool = False
    """Whether the stored bytes are only the start of the message."""
    trail: Note = ""
    """The phases that the message had passed, oldest first, separated by spaces: `sense match scale`."""
