"""Dead letters: the raw bytes kept for an operator, and the task ended all the same."""

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.hops.delivery import Delivery
from loom.bus.hops.duplicates import store_once
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.server_errors import Conflict
from loom.bus.records import records
from loom.bus.replies import allowed_reply
from loom.schemas.base import MAX_MESSAGE_BYTES, Undecodable, decode
from loom.schemas.dead_letter import DeadLetter
from loom.schemas.envelope import Envelope, Phase
from loom.schemas.identity import PUBLIC
from loom.schemas.notices import envelope_in
from loom.schemas.record import TaskRecord
from loom.schemas.task import Submission, TaskAd, TaskError
from loom.schemas.tokens import is_token

log = get_logger()

T = TypeVar("T")
End = Callable[[Envelope, bytes], Awaitable[None]]
"""Ends a task here, by an envelope with the error; the bytes are those of the dead message."""
_PREFIX = "Loom-Dead-"


async def dead_letter(
    bus: Bus, phase: Phase, task_id: str, delivery: Delivery, reason: str, end: End | None = None
) -> None:
    """Keep the message as a dead letter and see that its task ends.

    Args:
        end: How to end the task here; absent: by an envelope to EVALUATE.
    """
    raw = delivery.msg.data
    log.error("dead_letter", reason=reason, subject=delivery.subject, deliveries=delivery.facts.delivered)
    submitted = is_submission(bus, delivery.subject)
    submitter = submitter_in(bus, delivery.subject)
    record, is_unreadable = await _record(bus, task_id)
    own = None if submitted else _own_envelope(raw, task_id)
    told = own or (record.envelope if record is not None else None)
    letter = DeadLetter(
        phase=phase,
        task_id=task_id,
        subject=delivery.subject,
        deliveries=delivery.facts.delivered,
        reason=reason[:1000],
        stream_seq=delivery.facts.stream_seq,
        cut=len(raw) > MAX_MESSAGE_BYTES,
        trail=" ".join(hop.phase for hop in told.hops) if told is not None else "",
    )
    # INTAKE and TASKS count their sequences apart.
    msg_id = f"{task_id}:dead:{'intake-' if submitted else ''}{delivery.facts.stream_seq}"
    await store_once(
        bus,
        bus.subjects.of("dead", phase, task_id if is_token(task_id) else "unknown"),
        raw[:MAX_MESSAGE_BYTES],
        msg_id=msg_id,
        headers=letter_headers(letter),
    )
    envelope = (
        await _submitted(bus, task_id, raw, record, submitter)
        if submitted
        else own or _rebuilt(bus, phase, task_id, record)
    )
    if envelope is None and is_unreadable:
        envelope = _unknown(bus, task_id, "(unreadable task)", submitter)
    if envelope is None:
        return
    envelope = envelope.failed(
        TaskError(code="dead_letter", message=f"{phase} could not handle the task: {reason}"[:2000])
    )
    if end is not None:
        await end(envelope, raw)
    else:
        await store_once(bus, bus.subjects.task("evaluate", envelope.priority, task_id), envelope, msg_id=msg_id)


def is_submission(bus: Bus, subject: str) -> bool:
    """Return whether what was on `subject` came from a client: a Submission, where all others are envelopes."""
    parsed = bus.subjects.parse(subject)
    return parsed is not None and parsed.family == "intake"


def submitter_in(bus: Bus, subject: str) -> str:
    """Return whose task a message is about, as far as its subject names the submitter."""
    parsed = bus.subjects.parse(subject)
    return parsed.tokens.get("submitter", PUBLIC) if parsed is not None else PUBLIC


async def _record(bus: Bus, task_id: str) -> tuple[TaskRecord | None, bool]:
    """Return the task's record, and whether there is one that cannot be read."""
    if not is_token(task_id):
        return None, False
    try:
        entry = await records(bus).get(task_id)
    except Undecodable as error:  # the letter is to be kept all the same
        log.warning("record_unreadable", reason=error.message)
        return None, True
    return entry.value if entry is not None else None, False


def _own_envelope(raw: bytes, task_id: str) -> Envelope | None:
    """The envelope in the message, if it is of the task its subject names."""
    envelope = envelope_in(raw)
    return envelope if envelope is not None and is_token(task_id) and envelope.task_id == task_id else None


def _rebuilt(bus: Bus, phase: Phase, task_id: str, record: TaskRecord | None) -> Envelope | None:
    """The envelope to end in the place of one that cannot be read; None where no task would end by it."""
    if record is not None:
        return replace(record.envelope, attempt=max(record.envelope.attempt, record.claim.attempt))
    if phase == "sense" and is_token(task_id):  # a subtask before its admission: somebody may wait for it
        return _unknown(bus, task_id, "(unreadable subtask)")
    return None


async def _submitted(bus: Bus, task_id: str, raw: bytes, record: TaskRecord | None, submitter: str) -> Envelope | None:
    """The envelope to end for a message of a client, which may be about a task of somebody else."""
    if not is_token(task_id):
        return None
    submission = _read(raw, Submission)
    if record is None:
        return await _admit_dead(bus, task_id, submission, submitter)
    own = record.envelope.submitter == submitter
    if submission is None or not own or submission.submission != record.submission:
        return None  # rubbish sent under the id of somebody's running task must not end it
    return _rebuilt(bus, "sense", task_id, record)


async def _admit_dead(bus: Bus, task_id: str, submission: Submission | None, submitter: str) -> Envelope:
    """Return an envelope for a task that died before its admission, recorded so that its submitter is answered."""
    if submission is None or submission.ad.task_id != task_id:
        return _unknown(bus, task_id, "(unreadable submission)", submitter)
    envelope = Envelope(ad=submission.ad, submitter=submitter, deadline=bus.clock.now())
    subject = bus.subjects.intake(submitter, envelope.priority, task_id)
    reply = allowed_reply(bus, submission.reply_to, plain=submitter == PUBLIC, subject=subject)
    record = TaskRecord(
        task_id=task_id,
        state="running",
        submission=submission.submission,
        reply_to=(reply,) if reply else (),
        envelope=envelope,
        admitted_at=bus.clock.now(),
    )
    with contextlib.suppress(Conflict):  # a twin of this message has been here
        await records(bus).create(task_id, record)
    return envelope


def _unknown(bus: Bus, task_id: str, description: str, submitter: str = PUBLIC) -> Envelope:
    return Envelope(ad=TaskAd(task_id=task_id, description=description), submitter=submitter, deadline=bus.clock.now())


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


def letter_facts(headers: Mapping[str, str], subject: str) -> DeadLetter:
    """Return what `headers` tell of the dead letter on `subject`, as far as they tell it.

    Anybody may publish to that subject, so that any fact may be missing or nonsense: then they all stand at nothing.
    """
    _, _, phase, task_id = (*subject.split("."), "", "", "", "")[:4]
    nothing = {"phase": phase, "task_id": task_id, "subject": "", "deliveries": 0, "reason": ""}
    given = {name: headers.get(_PREFIX + name.replace("_", "-")) for name in DeadLetter.__struct_fields__}
    known = {name: text for name, text in given.items() if text is not None}
    try:
        return msgspec.convert({**nothing, **known}, DeadLetter, strict=False)
    except ValueError:
        return msgspec.convert(nothing, DeadLetter)
