"""Task records: reading them, changing them by compare-and-set, and the version of them that an envelope carries."""

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.natsio.kv import Bucket, Entry
from loom.schemas.base import Message, Name, Timestamp, Undecodable
from loom.schemas.decoding.unknown_fields import unknown_fields, with_unknown_fields
from loom.schemas.envelope import Envelope, RecordVersion, ReplySubjects
from loom.schemas.record import TaskRecord


def records(bus: Bus) -> Bucket[TaskRecord]:
    """Return the bucket of task records."""
    return bus.bucket("records", TaskRecord)


def record_from(envelope: Envelope) -> Entry[TaskRecord] | None:
    """Return the record as of the envelope's `record_version`, for a first compare-and-set without a read.

    A write fails if the record has changed since. None if the envelope has no `record_version`.
    """
    version = envelope.record_version
    if version is None:
        return None
    record = TaskRecord(
        task_id=envelope.task_id,
        state="running",
        submission=version.submission,
        reply_to=version.reply_to,
        envelope=replace(envelope, record_version=None),
        claim=version.claim,
        admitted_at=version.admitted_at,
    )
    return Entry(envelope.task_id, with_unknown_fields(record, unknown_fields(version)), version.revision)


def record_version(record: TaskRecord, revision: int) -> RecordVersion | None:
    """Return the version of a stored record for the next envelope; None for a record with facts it cannot hold."""
    if record.ended or record.delegated:
        return None
    version = RecordVersion(
        revision=revision,
        submission=record.submission,
        reply_to=record.reply_to,
        claim=record.claim,
        admitted_at=record.admitted_at,
    )
    return with_unknown_fields(version, unknown_fields(record))


class _ReadableFields(Message, frozen=True, kw_only=True):
    """The fields of a record without which its submitters get no reply."""

    submission: Name = ""
    reply_to: ReplySubjects = ()
    admitted_at: Timestamp = 0.0


async def salvaged(bus: Bus, envelope: Envelope) -> Entry[TaskRecord]:
    """Return a running record to store in place of one that cannot be decoded, with its fields that can be.

    Args:
        envelope: The task's; its `record_version` is used where the stored record has no readable field.
    """
    task_id = envelope.task_id
    version = envelope.record_version
    fields = _ReadableFields(submission=version.submission, reply_to=version.reply_to) if version else _ReadableFields()
    try:
        entry = await bus.bucket("records", _ReadableFields).get(task_id)
        fields = entry.value if entry is not None else fields
    except Undecodable:
        pass  # no field can be read: those of the envelope remain
    record = TaskRecord(
        task_id=task_id,
        state="running",
        submission=fields.submission,
        reply_to=fields.reply_to,
        envelope=envelope,
        admitted_at=fields.admitted_at or bus.clock.now(),
    )
    return Entry(task_id, record, await records(bus).revision(task_id))
