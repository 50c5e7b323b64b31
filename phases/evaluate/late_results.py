"""Which results come too late: those of an attempt that a later one has replaced. Pure."""

from loom.schemas.envelope import Envelope
from loom.schemas.record import TaskRecord


def is_late(envelope: Envelope, record: TaskRecord) -> bool:
    """Return whether a later attempt has replaced the envelope's; a cancel is never late, for it is of the task."""
    cancelled = envelope.error is not None and envelope.error.code == "cancelled"
    return envelope.attempt < record.claim.attempt and not cancelled
