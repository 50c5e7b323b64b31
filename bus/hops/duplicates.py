"""What is done when the message id of a first sending was taken: the message that took it must be ours.

Ids are deterministic, so a twin of the sender may have stored the same message before; that is why it is a duplicate
and no fault. But any client that may publish into the stream can guess an id and store another message under it.
"""

from collections.abc import Coroutine, Mapping
from datetime import datetime
from typing import Any

from loom.bus.bus import Bus
from loom.bus.hops.schedules import SCHEDULE, TARGET, may_schedule
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.publishing import PubAck
from loom.bus.natsio.stored_message import StoredMessage, read_message
from loom.bus.records import records
from loom.schemas.base import Undecodable, decode, encode, new_id
from loom.schemas.envelope import Envelope
from loom.schemas.learning import Reward
from loom.schemas.notices import PlanTimeout, envelope_in, read_scale_message

log = get_logger()

_AT = "@at "
_TOLERANCE_S = 1.0


def store_once(
    bus: Bus, subject: str, message: Any, *, msg_id: str, headers: dict[str, str] | None = None
) -> Coroutine[Any, Any, PubAck]:
    """Send a message to be stored unless the same one is stored already; await what is returned, as with `Bus.store`.

    Raises:
        BusUnavailable, Overloaded, Refused: As `Bus.store`.
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
    """Return `ack`, a duplicate's, where a twin has stored the message; else store it under a random id.

    Args:
        after: Sequence in the same stream of the message this one follows from; 0 where there is none.
    """
    stored = await read_message(bus.jetstream, ack.stream, {"seq": ack.seq})
    if stored is None:
        # Settled by its reader, or removed by the client that took the id: the task itself shows which.
        envelope = _carried(message)  # a notice does not carry the task, and may come twice
        ours = envelope is not None and await _goes_on(bus, envelope, subject, max(ack.seq, after))
    else:
        ours = is_ours(stored, subject, message, headers or {}, bus.clock.now())
    if ours:
        return ack
    log.warning("message_id_taken", subject=subject, by=stored.subject if stored else "", seq=ack.seq)
    return await bus.jetstream.publish(subject, message, msg_id=f"{msg_id}:{new_id()}", headers=headers)


def is_ours(stored: StoredMessage, subject: str, message: Any, headers: Mapping[str, str], now: float) -> bool:
    """Return whether a stored message does what `message` is to do.

    An envelope, also one in a PlanTimeout, must be of the same task and attempt and, on its way back by a schedule,
    not much later. Differences between twins (hops, times, instance, result) do not count. A reward must have the
    same id and score. Anything else must be the same bytes.
    """
    if isinstance(message, Reward):
        return _is_same_reward(stored, subject, message)
    wanted = _carried(message)
    if wanted is None:
        return stored.subject == subject and stored.data == (message if isinstance(message, bytes) else encode(message))
    try:
        twin = read_scale_message(stored.data)
    except Undecodable:
        return False
    carried = _carried(twin)
    if carried is None or type(twin) is not type(message):
        return False
    same = (carried.task_id, carried.attempt) == (wanted.task_id, wanted.attempt)
    return same and _comes_out_alike(stored, subject, headers, now)


def _is_same_reward(stored: StoredMessage, subject: str, reward: Reward) -> bool:
    """Whether a reward of the same id is stored; an inheritance of any heir counts as the same."""
    try:
        twin = decode(stored.data, Reward)
    except Undecodable:
        return False
    if (twin.reward_id, twin.kind) != (reward.reward_id, reward.kind):
        return False
    if reward.kind == "inherit":
        address = f".reward.{twin.source}.{twin.owner}.{twin.node_id}.{twin.domain_token}"
        return stored.subject.endswith(address)
    return stored.subject == subject and twin.score == reward.score


def _carried(message: Any) -> Envelope | None:
    """The envelope that a message is or holds."""
    if isinstance(message, PlanTimeout):
        return message.envelope
    return message if isinstance(message, Envelope) else None


def _comes_out_alike(stored: StoredMessage, subject: str, headers: Mapping[str, str], now: float) -> bool:
    """Whether a stored message reaches the same phase as the wanted one would, and not much later.

    Twins schedule under subjects of their own, and one may wait where the other does not.
    """
    if SCHEDULE in stored.headers and not may_schedule(stored.subject, stored.headers.get(TARGET, "")):
        return False
    if _phase_subject(stored.subject, stored.headers) != _phase_subject(subject, headers):
        return False
    at, wanted = _due(stored.headers, now), _due(headers, now)
    return at is not None and wanted is not None and at <= wanted + max(0.0, wanted - now) + _TOLERANCE_S


def _phase_subject(subject: str, headers: Mapping[str, str]) -> str:
    return headers.get(TARGET, "") if SCHEDULE in headers else subject


def _due(headers: Mapping[str, str], now: float) -> float | None:
    """When the message comes out; None where that cannot be read."""
    text = headers.get(SCHEDULE)
    if text is None:
        return now
    try:
        return datetime.fromisoformat(text.removeprefix(_AT)).timestamp() if text.startswith(_AT) else None
    except ValueError:
        return None


async def _goes_on(bus: Bus, envelope: Envelope, subject: str, after: int) -> bool:
    """Whether the task has got beyond the hop on `subject`, of which nothing is stored any more."""
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
    carriers = (bus.subjects.later("*", envelope.task_id, "*"), bus.subjects.task("*", "*", envelope.task_id))
    for carrier in carriers:
        found = await read_message(bus.jetstream, bus.subjects.stream("TASKS"), {"last_by_subj": carrier})
        if found is not None and found.seq > after and _carries(found, envelope):
            return True
    return False


def _carries(found: StoredMessage, envelope: Envelope) -> bool:
    carried = envelope_in(found.data)
    return carried is not None and carried.task_id == envelope.task_id and carried.attempt >= envelope.attempt
