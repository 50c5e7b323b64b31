"""What a phase reports about its own work, for an operator's checks."""

from typing import Annotated

from msgspec import Meta

from loom.bus.logs.left_out import MAX_HOSTS, LeftOut
from loom.schemas.base import Count, Message, Name, Note, Seconds, total


class Health(Message, frozen=True, kw_only=True):
    """How far one phase of one process has got."""

    handled: Count = 0
    """Messages handled since the start."""
    in_hand: Count = 0
    oldest_s: Seconds = 0.0
    """How long the oldest of those in hand has been there."""
    last_seq: Count | None = None
    """ADAPT: sequence of the last reward read."""
    failure: Note = ""
    """The essential task that failed, and its error."""
    discards: Annotated[dict[Name, Count], Meta(max_length=100)] = {}
    """Log event -> messages of the whole process that were left out."""
    left_out: Annotated[dict[Name, LeftOut], Meta(max_length=MAX_HOSTS)] = {}
    """Host -> what the whole process left out of its messages."""


def together(parts: list[Health]) -> Health:
    """Return the health of several parts as one."""
    return Health(
        handled=total(*(part.handled for part in parts)),
        in_hand=total(*(part.in_hand for part in parts)),
        oldest_s=max((part.oldest_s for part in parts), default=0.0),
    )
