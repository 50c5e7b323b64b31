"""Admission: a task enters the loop once, however often it is submitted, and its id stays its own."""

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.kv import Entry
from loom.bus.natsio.server_errors import Conflict
from loom.bus.records import record_version, records, update_record
from loom.bus.replies import allowed_reply, answer, answer_error, answer_task
from loom.schemas.base import Undecodable
from loom.schemas.envelope import Envelope
from loom.schemas.errors import BusUnavailable, InvalidTask
from loom.schemas.identity import PUBLIC
from loom.schemas.record import TaskRecord
from loom.schemas.task import Accepted, Submission, TaskAd, TaskError, TaskResult, ad_digest

log = get_logger()

MAX_REPLIES = 8


class Admission:
    """Creates task records; the first one to do so admits the task."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.records = records(bus)

    async def check_id(self, ad: TaskAd, submitter: str) -> None:
        """Return unless the id of an ad is that of another task; this is cheap, and `admit` is the guarantee.

        Raises:
            InvalidTask: A task of another submitter, or of another ad, has the id.
        """
        try:
            entry = await self.records.get(ad.task_id)
        except Undecodable:  # its admission finds that, too
            return
        error = id_taken(entry.value, ad, submitter) if entry is not None else None
        if error is not None:
            raise error

    async def admit(self, envelope: Envelope, submission: str, reply_to: str = "") -> Envelope | None:
        """Create the task's record, and return the envelope, which knows of it, if this message carries the task on.

        None when another submission does: `reply_to` is then answered with the result, now if the task has ended,
        else when it ends; or refused, if the id is taken by another task.
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
            return await self._meet(envelope, submission, reply)
        return replace(envelope, record_version=record_version(record, revision))

    async def _meet(self, envelope: Envelope, submission: str, reply: str) -> Envelope | None:
        task_id = envelope.task_id
        entry = await self.records.get(task_id)
        if entry is None:
            raise BusUnavailable("a record conflicted and then was not there")
        record = entry.value
        error = id_taken(record, envelope.ad, envelope.submitter, submission)
        if error is not None:
            await self._refuse(envelope, reply, error, record)
            return None
        if record.ended:
            await answer_task(self._bus, reply, record)
            await self._publish_result(record)
            return None
        if record.submission == submission:
            return envelope
        if reply:
            await self._listen_too(entry, reply)
        return None

    async def _refuse(self, envelope: Envelope, reply: str, error: InvalidTask, record: TaskRecord) -> None:
        """Report a taken id to the submitter of `envelope` alone.

        A Runtime waits for `loom.result` and has no reply subject. Another submitter's is its own, and gets a failed
        result. The same submitter's is that of the known task too, and gets nothing but that task's own result, whose
        digest of the ad shows the Runtime, as the status does, that it is of another ad.
        """
        log.warning("task_id_taken", submitter=envelope.submitter, by=record.envelope.submitter)
        await answer_error(self._bus, reply, error)
        if envelope.submitter != record.envelope.submitter:
            refused = TaskResult(task_id=envelope.task_id, state="failed", error=TaskError.of(error))
            subject = self._bus.subjects.of("result", envelope.submitter, envelope.task_id)
            await self._bus.connection.publish(subject, refused)
        elif record.ended:
            await self._publish_result(record)

    async def _publish_result(self, record: TaskRecord) -> None:
        """Publish the result of a task that has ended once more, for a submitter that listens to it."""
        subject = self._bus.subjects.of("result", record.envelope.submitter, record.task_id)
        await self._bus.connection.publish(subject, record.to_result())

    async def _listen_too(self, entry: Entry[TaskRecord], reply: str) -> None:
        def add(record: TaskRecord) -> TaskRecord | None:
            if record.ended or reply in record.reply_to or len(record.reply_to) >= MAX_REPLIES:
                return None
            return replace(record, reply_to=(*record.reply_to, reply))

        changed = await update_record(self.records, entry.key, add)
        record = changed.value if changed else entry.value
        if record.ended:
            await answer_task(self._bus, reply, record)
        elif reply not in record.reply_to:
            await answer(self._bus, reply, Accepted(task_id=record.task_id))


def id_taken(record: TaskRecord, ad: TaskAd, submitter: str, submission: str = "") -> InvalidTask | None:
    """Return why the task of a record is not the one an ad describes; None where it is.

    Args:
        submission: Of the ad; the one that the record is of has its ad, whatever that says.
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
    """Return the first envelope of a submission; its deadline counts from when the server stored it."""
    ad = submission.ad
    return Envelope(
        ad=ad, submitter=submitter, deadline=stored_at + ad.timeout_s, budget=ad.token_budget, trace=trace[:256]
    )
