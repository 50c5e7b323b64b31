"""Admission: a task enters the loop once, whoever submits it and however often."""

from msgspec.structs import replace

from loom.bus.answers import answer, answer_task, may_answer
from loom.bus.client import Bus, Conflict
from loom.bus.kv import Entry
from loom.bus.log import get_logger
from loom.bus.records import change, record_version, records
from loom.schemas.envelope import Envelope, TaskRecord
from loom.schemas.errors import BusUnavailable
from loom.schemas.task import Accepted, Submission

log = get_logger()

MAX_REPLIES = 8


class Admission:
    """Creates task records; the first one to do so admits the task."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.records = records(bus)

    async def admit(self, envelope: Envelope, submission: str, reply_to: str = "") -> Envelope | None:
        """Create the task's record, and return the envelope, which knows of it, if this message carries the task on.

        None when someone else's submission does: `reply_to` is then answered with the result, now if the
        task has ended, else when it ends.
        """
        reply = reply_to if may_answer(reply_to) else ""
        record = TaskRecord(
            task_id=envelope.task_id,
            state="running",
            submission=submission,
            reply_to=(reply,) if reply else (),
            envelope=envelope,
            admitted_at=self._bus.now(),
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
        if entry.value.ended:
            await answer_task(self._bus, reply, entry.value)
            # Who listens instead of asking hears it too.
            await self._bus.publish(
                self._bus.subjects.of("result", entry.value.envelope.submitter, task_id), entry.value.to_result()
            )
            return None
        if entry.value.submission == submission:
            return envelope
        if reply:
            await self._listen_too(entry, reply)
        return None

    async def _listen_too(self, entry: Entry[TaskRecord], reply: str) -> None:
        def add(record: TaskRecord) -> TaskRecord | None:
            if record.ended or reply in record.reply_to or len(record.reply_to) >= MAX_REPLIES:
                return None
            return replace(record, reply_to=(*record.reply_to, reply))

        changed = await change(self.records, entry.key, add)
        record = changed.value if changed else entry.value
        if record.ended:
            await answer_task(self._bus, reply, record)
        elif reply not in record.reply_to:
            await answer(self._bus, reply, Accepted(task_id=record.task_id))


def envelope_for(submission: Submission, submitter: str, stored_at: float, trace: str) -> Envelope:
    """Return the first envelope of a submission; its deadline counts from when the server stored it."""
    ad = submission.ad
    return Envelope(
        ad=ad, submitter=submitter, deadline=stored_at + ad.timeout_s, budget=ad.token_budget, trace=trace[:256]
    )
