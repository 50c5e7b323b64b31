"""Admission: a task enters the loop once, however often it is submitted, and its id is never reused."""

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.kv import Entry
from loom.bus.natsio.server_errors import Conflict
from loom.bus.records import record_version, records
from loom.bus.replies import allowed_reply, send_error, send_reply, send_result
from loom.schemas.base import Undecodable
from loom.schemas.envelope import Envelope
from loom.schemas.errors import BusUnavailable, InvalidTask
from loom.schemas.identity import PUBLIC
from loom.schemas.record import TaskRecord
from loom.schemas.task import Accepted, Submission, TaskAd, TaskError, TaskResult, ad_digest

log = get_logger()

MAX_REPLIES = 8


class Admission:
    """Creates task records; the message that creates the record admits the task."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.records = records(bus)

    async def check_id(self, ad: TaskAd, submitter: str) -> None:
        """Raise if the id of an ad belongs to another task: a cheap first check, whereas `admit` guarantees the rule.

        Raises:
            InvalidTask: The id is taken by a task of another submitter or of another ad.
        """
        try:
            entry = await self.records.get(ad.task_id)
        except Undecodable:  # its admission raises it again
            return
        error = id_taken(entry.value, ad, submitter) if entry is not None else None
        if error is not None:
            raise error

    async def admit(self, envelope: Envelope, submission: str, reply_to: str = "") -> Envelope | None:
        """Create the task's record and return the envelope with its record version.

        None for a duplicate of a task that another message carries. Its `reply_to` then gets the result, now or when
        the task ends, or an error if the id is taken by another task.

        Args:
            submission: Id of the submission; a redelivered message has the same one and is admitted again.
            reply_to: Reply subject for the result; empty: none.
        """
        subject = self._bus.subjects.intake(envelope.submitter, envelope.priority, envelope.task_id)
        reply = allowed_reply(self._bus, reply_to, plain=envelope.submitter == PUBLIC, subject=subject)
        record = TaskRecord(
            task_id=envelope.task_id,
            state="running",
            submission=submission,
            reply_to=(reply,) if reply else (),
            envelope=envelope,
            admitted_at=self._bus.clock.now(),
        )
        try:
            revision = await self.records.create(envelope.task_id, record)
        except Conflict:
            return await self._on_duplicate(envelope, submission, reply)
        return replace(envelope, record_version=record_version(record, revision))

    async def _on_duplicate(self, envelope: Envelope, submission: str, reply: str) -> Envelope | None:
        task_id = envelope.task_id
        entry = await self.records.get(task_id)
        if entry is None:
            raise BusUnavailable(f"the record of {task_id} existed and was deleted meanwhile")
        record = entry.value
        error = id_taken(record, envelope.ad, envelope.submitter, submission)
        if error is not None:
            await self._refuse(envelope, reply, error, record)
            return None
        if record.ended:
            await send_result(self._bus, reply, record)
            await self._publish_result(record)
            return None
        if record.submission == submission:
            return envelope
        if reply:
            await self._add_reply_to(entry, reply)
        return None

    async def _refuse(self, envelope: Envelope, reply: str, error: InvalidTask, record: TaskRecord) -> None:
        """Report a taken id to the submitter of `envelope` only.

        A Runtime has no reply subject and waits for `loom.result`. Another submitter gets a failed result on its own
        subject. The same submitter gets only the result of the known task, whose digest of the ad shows the Runtime,
        as the status does, that it is of another ad.
        """
        log.warning("task_id_taken", submitter=envelope.submitter, by=record.envelope.submitter)
        await send_error(self._bus, reply, error)
        if envelope.submitter != record.envelope.submitter:
            refused = TaskResult(task_id=envelope.task_id, state="failed", error=TaskError.of(error))
            subject = self._bus.subjects.of("result", envelope.submitter, envelope.task_id)
            await self._bus.connection.publish(subject, refused)
        elif record.ended:
            await self._publish_result(record)

    async def _publish_result(self, record: TaskRecord) -> None:
        """Publish the result of an ended task again, for a submitter that waits for it."""
        subject = self._bus.subjects.of("result", record.envelope.submitter, record.task_id)
        await self._bus.connection.publish(subject, record.to_result())

    async def _add_reply_to(self, entry: Entry[TaskRecord], reply: str) -> None:
        def add(record: TaskRecord) -> TaskRecord | None:
            if record.ended or reply in record.reply_to or len(record.reply_to) >= MAX_REPLIES:
                return None
            return replace(record, reply_to=(*record.reply_to, reply))

        changed = await self.records.update_with(entry.key, add)
        record = changed.value if changed else entry.value
        if record.ended:
            await send_result(self._bus, reply, record)
        elif reply not in record.reply_to:
            await send_reply(self._bus, reply, Accepted(task_id=record.task_id))


def id_taken(record: TaskRecord, ad: TaskAd, submitter: str, submission: str = "") -> InvalidTask | None:
    """Return the error if a record belongs to another task than an ad; None if it belongs to the same task.

    Args:
        submission: Id of the submission; that of the record always matches.
    """
    task_id = record.task_id
    if record.envelope.submitter != submitter:
        why = f"the id {task_id} is taken by a task of another submitter; choose another one"
        return InvalidTask(why, field="task_id", task_id=task_id)
    if record.submission == submission or record.ad_digest in ("", ad_digest(ad)):
        return None
    why = f"the id {task_id} is taken by another ad; choose another one, or send the same ad again for its result"
    return InvalidTask(why, field="task_id", task_id=task_id)


def envelope_for(submission: Submission, submitter: str, stored_at: float, trace: str) -> Envelope:
    """Return the first envelope of a submission.

    Args:
        stored_at: Server time at which the submission was stored; the deadline counts from then.
    """
    ad = submission.ad
    return Envelope(
        ad=ad, submitter=submitter, deadline=stored_at + ad.timeout_s, budget=ad.token_budget, trace=trace[:256]
    )
