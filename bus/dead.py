"""Dead letters: the raw bytes kept for an operator, and the task ended all the same."""

import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
from msgspec.structs import replace

from loom.bus.answers import may_answer
from loom.bus.client import Bus, Conflict
from loom.bus.delivery import Delivery
from loom.bus.records import records
from loom.schemas.envelope import DeadLetter, Envelope, Phase, TaskRecord
from loom.schemas.task import Submission, TaskAd, TaskError, is_token
from loom.schemas.wire import MAX_MESSAGE_BYTES, Undecodable, decode

log = structlog.get_logger()

T = TypeVar("T")
End = Callable[[Envelope], Awaitable[None]]
_PREFIX = "Loom-Dead-"


async def bury(bus: Bus, phase: Phase, task_id: str, delivery: Delivery, reason: str, end: End | None = None) -> None:
    """Keep the message as a dead letter and see that its task ends.

    Args:
        end: How to end the task here; absent: by an envelope to EVALUATE.
    """
    raw = delivery.msg.data
    log.error("dead_letter", reason=reason, subject=delivery.subject, deliveries=delivery.facts.delivered)
    letter = DeadLetter(
        phase=phase,
        task_id=task_id,
        subject=delivery.subject,
        deliveries=delivery.facts.delivered,
        reason=reason[:1000],
        stream_seq=delivery.facts.stream_seq,
        cut=len(raw) > MAX_MESSAGE_BYTES,
    )
    msg_id = f"{task_id}:dead:{delivery.facts.stream_seq}"
    await bus.store(
        bus.subjects.of("dead", phase, task_id if is_token(task_id) else "unknown"),
        raw[:MAX_MESSAGE_BYTES],
        msg_id=msg_id,
        headers=letter_headers(letter),
    )
    envelope = await _rebuild(bus, phase, task_id, raw)
    if envelope is None:
        return
    envelope = envelope.failed(
        TaskError(code="dead_letter", message=f"{phase} could not handle the task: {reason}"[:2000])
    )
    if end is not None:
        await end(envelope)
    else:
        await bus.store(bus.subjects.task("evaluate", envelope.priority, task_id), envelope, msg_id=msg_id)


async def _rebuild(bus: Bus, phase: Phase, task_id: str, raw: bytes) -> Envelope | None:
    """Return the envelope to end: the message's own where it can be read, else the record's, else a bare one."""
    if not is_token(task_id):
        return None
    entry = await records(bus).get(task_id)
    if phase == "sense":
        submission = _read(raw, Submission)
        if entry is None:
            return await _admit_dead(bus, task_id, submission)
        if submission is None or submission.submission != entry.value.submission:
            return None  # rubbish sent under the id of somebody's running task must not end it
    else:
        envelope = _read(raw, Envelope)
        if envelope is not None and envelope.task_id == task_id:
            return envelope
    if entry is not None:
        return replace(entry.value.envelope, attempt=max(entry.value.envelope.attempt, entry.value.claim.attempt))
    return None


async def _admit_dead(bus: Bus, task_id: str, submission: Submission | None) -> Envelope:
    """Return an envelope for a task that died before its admission, recorded so that its submitter is answered."""
    if submission is None or submission.ad.task_id != task_id:
        return Envelope(ad=TaskAd(task_id=task_id, description="(unreadable submission)"), deadline=bus.now())
    envelope = Envelope(ad=submission.ad, deadline=bus.now())
    record = TaskRecord(
        task_id=task_id,
        state="running",
        submission=submission.submission,
        reply_to=(submission.reply_to,) if may_answer(submission.reply_to) else (),
        envelope=envelope,
        admitted_at=bus.now(),
    )
    with contextlib.suppress(Conflict):  # a twin of this message has been here
        await records(bus).create(task_id, record)
    return envelope


def _read(raw: bytes, shape: type[T]) -> T | None:
    try:
        return decode(raw, shape)
    except Undecodable:
        return None


def letter_headers(letter: DeadLetter) -> dict[str, str]:
    """Return the facts of a dead letter as message headers."""
    plain = {name: str(getattr(letter, name)) for name in letter.__struct_fields__}
    return {
        _PREFIX + name.replace("_", "-"): " ".join(value.encode("ascii", "replace").decode().split())
        for name, value in plain.items()
    }
