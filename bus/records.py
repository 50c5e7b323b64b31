"""Task records: read and change by compare-and-set."""

import asyncio
import random
from collections.abc import Callable

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.natsio.kv import Bucket, Entry
from loom.bus.natsio.server_errors import Conflict
from loom.schemas.base import Message, Name, Timestamp, Undecodable
from loom.schemas.decoding.unknown_fields import unknown_fields, with_unknown_fields
from loom.schemas.envelope import Envelope, RecordVersion, ReplySubjects
from loom.schemas.errors import BusUnavailable
from loom.schemas.record import TaskRecord

TRIES = 16  # writers of one record are few; more than this is not contention


def records(bus: Bus) -> Bucket[TaskRecord]:
    """Return the bucket of task records."""
    return bus.bucket("records", TaskRecord)


def record_from(envelope: Envelope) -> Entry[TaskRecord] | None:
    """Return the record as it was when the envelope was sent: good for a write, which fails if it has changed since.

    None when the envelope does not tell.
    """
    known = envelope.record_version
    if known is None:
        return None
    record = TaskRecord(
        task_id=envelope.task_id,
        state="running",
        submission=known.submission,
        reply_to=known.reply_to,
        envelope=replace(envelope, record_version=None),
        claim=known.claim,
        admitted_at=known.admitted_at,
    )
    return Entry(envelope.task_id, with_unknown_fields(record, unknown_fields(known)), known.revision)


def record_version(record: TaskRecord, revision: int) -> RecordVersion | None:
    """Return what an envelope is to tell of the record it leaves behind; None for what it cannot tell in full."""
    if record.ended or record.delegated:
        return None
    known = RecordVersion(
        revision=revision,
        submission=record.submission,
        reply_to=record.reply_to,
        claim=record.claim,
        admitted_at=record.admitted_at,
    )
    return with_unknown_fields(known, unknown_fields(record))


async def update_record(
    bucket: Bucket[TaskRecord],
    task_id: str,
    decide: Callable[[TaskRecord], TaskRecord | None],
    entry: Entry[TaskRecord] | None = None,
) -> Entry[TaskRecord] | None:
    """Apply `decide` to the record until nobody else wrote in between.

    Args:
        decide: Pure. Returns the new record, or None to leave it as it is.
        entry: What to try on first, unread.

    Returns:
        The record as it now is; None when there is none.

    Raises:
        BusUnavailable: The record would not hold still.
    """
    for _ in range(TRIES):
        entry = entry or await bucket.get(task_id)
        if entry is None:
            return None
        wanted = decide(entry.value)
        if wanted is None:
            return entry
        try:
            return Entry(task_id, wanted, await bucket.update(task_id, wanted, entry.revision))
        except Conflict:
            entry = None
            await asyncio.sleep(random.uniform(0, 0.01))  # noqa: S311 - apart from the others who lost the race
    raise BusUnavailable(f"record {task_id} was changed by others {TRIES} times in a row")


class _Remains(Message, frozen=True, kw_only=True):
    """The fields of a record that its submitters need."""

    submission: Name = ""
    reply_to: ReplySubjects = ()
    admitted_at: Timestamp = 0.0


async def salvaged(bus: Bus, envelope: Envelope) -> Entry[TaskRecord]:
    """Return a running record to write over one that cannot be read, with those of its fields that can be.

    Args:
        envelope: The task's, for what is known of the record besides.
    """
    task_id = envelope.task_id
    known = envelope.record_version
    remains = _Remains(submission=known.submission, reply_to=known.reply_to) if known else _Remains()
    try:
        entry = await bus.bucket("records", _Remains).get(task_id)
        remains = entry.value if entry is not None else remains
    except Undecodable:
        pass  # nothing of it can be read; the envelope may know
    record = TaskRecord(
        task_id=task_id,
        state="running",
        submission=remains.submission,
        reply_to=remains.reply_to,
        envelope=envelope,
        admitted_at=remains.admitted_at or bus.clock.now(),
    )
    return Entry(task_id, record, await records(bus).revision(task_id))
