"""The description of a message that could not be handled."""

from typing import Annotated

from msgspec import Meta

from loom.schemas.base import CheckedMessage, Count, Note

Subject = Annotated[str, Meta(max_length=4096)]
"""As long as the server takes one; a token of it may be as long."""


class DeadLetter(CheckedMessage, frozen=True, kw_only=True):
    """The facts beside the raw bytes of a message that could not be handled."""

    phase: Subject
    task_id: Subject
    subject: Subject
    deliveries: Count
    reason: Annotated[str, Meta(max_length=1000)]
    stream_seq: Count = 0
    cut: bool = False
    """Whether the bytes kept are fewer than there were."""
    trail: Note = ""
    """The phases it had passed, oldest first, with a space between: `sense match scale`."""
