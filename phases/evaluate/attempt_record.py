"""The record of the task whose attempt an envelope reports."""

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.kv import Entry
from loom.bus.natsio.server_errors import Conflict
from loom.bus.records import record_from, records
from loom.phases.evaluate.late_results import is_late
from loom.phases.evaluate.retry_policy import Finish
from loom.schemas.envelope import Envelope
from loom.schemas.record import TaskRecord

log = get_logger()


class AttemptRecord:
    """Reads and ends the record of one task, for the message of one attempt.

    A write is tried first on the record that the envelope describes, without a read; it fails if the record has
    changed since. Every other decision needs a read, which happens at most once.

    Args:
        bus: A connected bus.
        envelope: The envelope as consumed, with the version of the record.
    """

    def __init__(self, bus: Bus, envelope: Envelope) -> None:
        self._bus = bus
        self._records = records(bus)
        self._envelope = replace(envelope, record_version=None)
        self._entry = record_from(envelope)
        self._is_read = False

    @property
    def ended(self) -> TaskRecord | None:
        """The record as last read or written, if it has ended; else None."""
        return self._entry.value if self._entry is not None and self._entry.value.ended else None

    async def is_open(self) -> bool:
        """Return whether the attempt may still end its task or be retried."""
        if not self._is_read:
            await self._read()
        return self._entry is not None and not self._entry.value.ended and not self._is_late(self._entry.value)

    async def finish(self, finish: Finish) -> None:
        """End the task, unless it has ended or a later attempt is running."""
        if self.ended is None and (self._entry is not None or await self.is_open()):
            self._entry = await write_end(self._bus, finish, self._envelope, self._entry)

    def _is_late(self, record: TaskRecord) -> bool:
        return is_late(self._envelope, record)

    async def _read(self) -> None:
        self._is_read = True
        self._entry = await self._records.get(self._envelope.task_id) or await self._create_missing()
        if self._entry is None:
            log.warning("record_missing", attempt=self._envelope.attempt)
        elif not self._entry.value.ended and self._is_late(self._entry.value):
            log.info("late_result_dropped", attempt=self._envelope.attempt, claimed=self._entry.value.claim.attempt)

    async def _create_missing(self) -> Entry[TaskRecord] | None:
        """Create the record of a message that never reached admission; only such a message may lack a record."""
        envelope = self._envelope
        if any(hop.phase != "sense" for hop in envelope.hops):
            return None
        record = TaskRecord(
            task_id=envelope.task_id, state="running", envelope=envelope, admitted_at=self._bus.clock.now()
        )
        try:
            revision = await self._records.create(envelope.task_id, record)
        except Conflict:
            return await self._records.get(envelope.task_id)
        return Entry(envelope.task_id, record, revision)


async def write_end(
    bus: Bus, finish: Finish, envelope: Envelope, entry: Entry[TaskRecord] | None = None
) -> Entry[TaskRecord] | None:
    """End the task's record by compare-and-set, unless it has ended or a later attempt is running.

    Args:
        bus: A connected bus.
        finish: The end to write.
        envelope: Envelope of the attempt.
        entry: The record to try first, without a read.

    Returns:
        The record as it now is; None if there is none.
    """
    now = bus.clock.now()

    def end(record: TaskRecord) -> TaskRecord | None:
        if record.ended or is_late(envelope, record):
            return None
        return replace(
            record,
            state=finish.state,
            envelope=finish.envelope,
            ended_at=now,
            score=finish.score,
            below_threshold=finish.below_threshold,
            rejected=finish.rejected,
        )

    written = await records(bus).update_with(envelope.task_id, end, entry)
    if written is not None and written.value.ended:
        result = written.value.to_result()
        log.info("task_ended", state=result.state, code=result.error.code if result.error else "")
    return written
