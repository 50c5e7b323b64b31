"""Stores messages that cannot be handled as dead letters, and ends their tasks."""

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
"""Ends a task within the phase: called with an envelope that has the error, and the body of the dead message."""
_PREFIX = "Loom-Dead-"


async def dead_letter(
    bus: Bus, phase: Phase, task_id: str, delivery: Delivery, reason: str, end: End | None = None
) -> None:
    """Store a message as a dead letter, and end its task.

    Args:
        task_id: Last token of the subject; any text.
        reason: Why the message cannot be handled; truncated to 1000 characters.
        end: Ends the task; default: by an envelope to EVALUATE.
    """
    raw = delivery.msg.data
    log.error("dead_letter", reason=reason, subject=delivery.subject, deliveries=delivery.facts.delivered)
    submitted = is_submission(bus, delivery.subject)
    submitter = submitter_in(bus, delivery.subject)
    record, is_unreadable = await _record(bus, task_id)
    own = None if submitted else _own_envelope(raw, task_id)
    latest = own or (record.envelope if record is not None else None)
    letter = _letter(phase, task_id, delivery, reason, latest)
    # INTAKE and TASKS have sequences of their own.
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


def _letter(phase: Phase, task_id: str, delivery: Delivery, reason: str, envelope: Envelope | None) -> DeadLetter:
    """Return the facts of a dead letter; `envelope` is the task's, if it is known."""
    return DeadLetter(
        phase=phase,
        task_id=task_id,
        subject=delivery.subject,
        deliveries=delivery.facts.delivered,
        reason=reason[:1000],
        stream_seq=delivery.facts.stream_seq,
        cut=len(delivery.msg.data) > MAX_MESSAGE_BYTES,
        trail=" ".join(hop.phase for hop in envelope.hops) if envelope is not None else "",
    )


def is_submission(bus: Bus, subject: str) -> bool:
    """Return whether the messages on `subject` are submissions of clients, not envelopes."""
    parsed = bus.subjects.parse(subject)
    return parsed is not None and parsed.family == "intake"


def submitter_in(bus: Bus, subject: str) -> str:
    """Return the submitter in a subject; `public` if it has none."""
    parsed = bus.subjects.parse(subject)
    return parsed.tokens.get("submitter", PUBLIC) if parsed is not None else PUBLIC


async def _record(bus: Bus, task_id: str) -> tuple[TaskRecord | None, bool]:
    """Return the task's record, and whether a record exists that cannot be decoded."""
    if not is_token(task_id):
        return None, False
    try:
        entry = await records(bus).get(task_id)
    except Undecodable as error:  # the letter is stored nevertheless
        log.warning("record_unreadable", reason=error.message)
        return None, True
    return entry.value if entry is not None else None, False


def _own_envelope(raw: bytes, task_id: str) -> Envelope | None:
    """Return the envelope in the message, if its task is the one in the subject."""
    envelope = envelope_in(raw)
    return envelope if envelope is not None and is_token(task_id) and envelope.task_id == task_id else None


def _rebuilt(bus: Bus, phase: Phase, task_id: str, record: TaskRecord | None) -> Envelope | None:
    """Return an envelope that ends the task in place of one that cannot be decoded; None if no task would end by it."""
    if record is not None:
        return replace(record.envelope, attempt=max(record.envelope.attempt, record.claim.attempt))
    if phase == "sense" and is_token(task_id):  # a subtask before its admission: its parent may wait for it
        return _unknown(bus, task_id, "(unreadable subtask)")
    return None


async def _submitted(bus: Bus, task_id: str, raw: bytes, record: TaskRecord | None, submitter: str) -> Envelope | None:
    """Return the envelope that ends the task of a client's message, which may have the id of another client's task."""
    if not is_token(task_id):
        return None
    submission = _read(raw, Submission)
    if record is None:
        return await _admit_dead(bus, task_id, submission, submitter)
    own = record.envelope.submitter == submitter
    if submission is None or not own or submission.submission != record.submission:
        return None  # a message with the id of another client's running task must not end that task
    return _rebuilt(bus, "sense", task_id, record)


async def _admit_dead(bus: Bus, task_id: str, submission: Submission | None, submitter: str) -> Envelope:
    """Return an envelope for a task that failed before its admission, and create its record for the reply."""
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
    with contextlib.suppress(Conflict):  # another delivery of this message has created it
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
    """Return the facts of a dead letter as the headers of its message."""
    plain = {name: str(getattr(letter, name)) for name in letter.__struct_fields__}
    return {
        _PREFIX + name.replace("_", "-"): " ".join(value.encode("ascii", "replace").decode().split())
        for name, value in plain.items()
    }


def letter_facts(headers: Mapping[str, str], subject: str) -> DeadLetter:
    """Return the facts of a dead letter from its headers and its subject.

    Any client may have published it, so facts may be missing or invalid. A missing fact is empty or 0; if one is
    invalid, all facts but those of the subject are.
    """
    _, _, phase, task_id = (*subject.split("."), "", "", "", "")[:4]
    defaults = {"phase": phase, "task_id": task_id, "subject": "", "deliveries": 0, "reason": ""}
    texts = {name: headers.get(_PREFIX + name.replace("_", "-")) for name in DeadLetter.__struct_fields__}
    given = {name: text for name, text in texts.items() if text is not None}
    try:
        return msgspec.convert({**defaults, **given}, DeadLetter, strict=False)
    except ValueError:
        return msgspec.convert(defaults, DeadLetter)
