"""Publishing under deterministic message ids, and checks of the message that has taken an id before.

A duplicate is usually not a fault: another replica has stored the same message first. But any client with the
permission to publish into the stream can guess an id and store a different message under it.
"""

from collections.abc import Coroutine, Mapping
from datetime import datetime
from typing import Any

from loom.bus.bus import Bus
from loom.bus.hops.schedules import SCHEDULE, TARGET, may_schedule
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.publishing import PubAck
from loom.bus.natsio.stored_message import StoredMessage, last_message, message_at
from loom.bus.records import records
from loom.schemas.base import Undecodable, decode, encode, new_id
from loom.schemas.envelope import Envelope
from loom.schemas.learning.reward import Reward
from loom.schemas.notices import PlanTimeout, envelope_in, read_scale_message

log = get_logger()

_AT = "@at "
_TOLERANCE_S = 1.0


def store_once(
    bus: Bus, subject: str, message: Any, *, msg_id: str, headers: dict[str, str] | None = None
) -> Coroutine[Any, Any, PubAck]:
    """Publish a message into a stream unless the same message is stored already; return an awaitable of the PubAck.

    The message is sent immediately, also if the result is not awaited.

    Raises:
        BusUnavailable, Overloaded, Refused: As `JetStream.publish`.
    """
    sent = bus.jetstream.publish(subject, message, msg_id=msg_id, headers=headers)

    async def confirmed() -> PubAck:
        ack = await sent
        return await resolve(bus, ack, subject, message, msg_id=msg_id, headers=headers) if ack.duplicate else ack

    return confirmed()


async def resolve(
    bus: Bus,
    ack: PubAck,
    subject: str,
    message: Any,
    *,
    msg_id: str,
    headers: dict[str, str] | None = None,
    after: int = 0,
) -> PubAck:
    """Return `ack` if the message that has taken the id is equivalent; else store this one under a random id.

    Args:
        ack: Acknowledgement of a duplicate.
        after: Sequence, in the same stream, of the message that led to this one; 0 if it is in another stream.
    """
    stored = await message_at(bus.jetstream, ack.stream, ack.seq)
    if stored is None:
        # Acked by its consumer, or removed by the client that took the id: the state of the task shows which.
        envelope = _envelope_of(message)  # a notice has none, and may be stored twice
        equivalent = envelope is not None and await _has_progressed(bus, envelope, subject, max(ack.seq, after))
    else:
        equivalent = is_equivalent(stored, subject, message, headers or {}, bus.clock.now())
    if equivalent:
        return ack
    log.warning("message_id_taken", subject=subject, by=stored.subject if stored else "", seq=ack.seq)
    return await bus.jetstream.publish(subject, message, msg_id=f"{msg_id}:{new_id()}", headers=headers)


def is_equivalent(stored: StoredMessage, subject: str, message: Any, headers: Mapping[str, str], now: float) -> bool:
    """Return whether a stored message has the effect that `message` would have.

    An envelope, also the one in a PlanTimeout, must have the same task and attempt, and a scheduled one must not be
    due much later. Differences between replicas (hops, times, instance, result) do not matter. A reward must have
    the same id and score. Any other message must have the same bytes.

    Args:
        now: Server time, seconds since the epoch.
    """
    if isinstance(message, Reward):
        return _is_same_reward(stored, subject, message)
    envelope = _envelope_of(message)
    if envelope is None:
        return stored.subject == subject and stored.data == (message if isinstance(message, bytes) else encode(message))
    try:
        stored_message = read_scale_message(stored.data)
    except Undecodable:
        return False
    other = _envelope_of(stored_message)
    if other is None or type(stored_message) is not type(message):
        return False
    same = (other.task_id, other.attempt) == (envelope.task_id, envelope.attempt)
    return same and _is_delivered_alike(stored, subject, headers, now)


def _is_same_reward(stored: StoredMessage, subject: str, reward: Reward) -> bool:
    """Return whether the stored reward has the same id; for an inheritance the heir may be another node."""
    try:
        other = decode(stored.data, Reward)
    except Undecodable:
        return False
    if (other.reward_id, other.kind) != (reward.reward_id, reward.kind):
        return False
    if reward.kind == "inherit":
        address = f".reward.{other.source}.{other.owner}.{other.node_id}.{other.domain_token}"
        return stored.subject.endswith(address)
    return stored.subject == subject and other.score == reward.score


def _envelope_of(message: Any) -> Envelope | None:
    """Return the envelope that a message is or contains."""
    if isinstance(message, PlanTimeout):
        return message.envelope
    return message if isinstance(message, Envelope) else None


def _is_delivered_alike(stored: StoredMessage, subject: str, headers: Mapping[str, str], now: float) -> bool:
    """Return whether a stored message reaches the same phase as a new one would, and not much later.

    Replicas schedule under different subjects, and one may schedule a message that the other publishes immediately.
    """
    if SCHEDULE in stored.headers and not may_schedule(stored.subject, stored.headers.get(TARGET, "")):
        return False
    if _phase_subject(stored.subject, stored.headers) != _phase_subject(subject, headers):
        return False
    stored_due, due = _due(stored.headers, now), _due(headers, now)
    return stored_due is not None and due is not None and stored_due <= due + max(0.0, due - now) + _TOLERANCE_S


def _phase_subject(subject: str, headers: Mapping[str, str]) -> str:
    return headers.get(TARGET, "") if SCHEDULE in headers else subject


def _due(headers: Mapping[str, str], now: float) -> float | None:
    """Return the server time at which a message reaches its phase; None if its schedule cannot be parsed."""
    text = headers.get(SCHEDULE)
    if text is None:
        return now
    try:
        return datetime.fromisoformat(text.removeprefix(_AT)).timestamp() if text.startswith(_AT) else None
    except ValueError:
        return None


async def _has_progressed(bus: Bus, envelope: Envelope, subject: str, after: int) -> bool:
    """Return whether the task has progressed beyond the hop on `subject`, which is not stored any more."""
    parsed = bus.subjects.parse(subject)
    phase = parsed.tokens.get("phase", "") if parsed else ""
    try:
        entry = await records(bus).get(envelope.task_id)
    except Undecodable:
        return False
    if entry is None:
        return False
    if entry.value.ended or entry.value.claim.attempt > envelope.attempt or phase == "sense":
        return True
    filters = (bus.subjects.later("*", envelope.task_id, "*"), bus.subjects.task("*", "*", envelope.task_id))
    for filter_subject in filters:
        message = await last_message(bus.jetstream, bus.subjects.stream("TASKS"), filter_subject)
        if message is not None and message.seq > after and _is_of_attempt(message, envelope):
            return True
    return False


def _is_of_attempt(message: StoredMessage, envelope: Envelope) -> bool:
    """Return whether a stored message has an envelope of the same task, of this attempt or a later one."""
    stored = envelope_in(message.data)
    return stored is not None and stored.task_id == envelope.task_id and stored.attempt >= envelope.attempt
