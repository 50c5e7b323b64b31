"""The health report of a phase, which `loom doctor` reads."""

from typing import Annotated

from msgspec import Meta

from loom.bus.logs.discard_reports import MAX_HOSTS, DiscardReport
from loom.schemas.base import Count, Message, Name, Note, Seconds, total


class Health(Message, frozen=True, kw_only=True):
    """The progress and the failures of one phase of one process."""

    handled: Count = 0
    """Messages handled since the start."""
    in_hand: Count = 0
    """Messages that are being handled."""
    oldest_s: Seconds = 0.0
    """Age of the oldest message that is being handled."""
    last_seq: Count | None = None
    """ADAPT: sequence of the last reward that was read."""
    failure: Note = ""
    """Name and error of the essential task that failed."""
    discards: Annotated[dict[Name, Count], Meta(max_length=100)] = {}
    """Log event -> number of messages that the whole process discarded."""
    left_out: Annotated[dict[Name, DiscardReport], Meta(max_length=MAX_HOSTS)] = {}
    """Host -> what the whole process discarded of its messages."""


def merged_health(parts: list[Health]) -> Health:
    """Return the health of several parts of a phase as one."""
    return Health(
        handled=total(*(part.handled for part in parts)),
        in_hand=total(*(part.in_hand for part in parts)),
        oldest_s=max((part.oldest_s for part in parts), default=0.0),
    )
