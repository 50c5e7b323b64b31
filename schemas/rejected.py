"""The answer that a task without an accepted one has to show."""

from typing import Any

from loom.schemas.base import CheckedMessage, Name, Note, Text, Unit
from loom.schemas.identity import LOCAL_OWNER, qualified


class BestRejected(CheckedMessage, frozen=True, kw_only=True):
    """The best answer that was refused, with the reason."""

    content: Text
    """At most 64 KiB of JSON."""
    truncated: bool = False
    """Whether the answer was longer and has been cut."""
    score: Unit = 0.0
    """The judge's; 0 where the answer broke a rule and was not judged."""
    reason: Note = ""
    """Why it was refused."""
    node_id: Name = ""
    """The node that gave it."""
    owner: Name = LOCAL_OWNER
    """Whose node it is."""

    @property
    def node(self) -> str:
        """The node as people write it."""
        return qualified(self.owner, self.node_id)


def facts_of(best: BestRejected | None) -> dict[str, Any]:
    """Return what an exception has of it: the whole as `best_rejected`, its text as `partial`."""
    return {} if best is None else {"best_rejected": best, "partial": best.content}
