"""Dead letters read back by an operator: looked at, handed in again, dropped."""

import base64
import contextlib
from collections.abc import Mapping
from datetime import datetime
from hashlib import blake2b
from typing import Any, NamedTuple

from msgspec.structs import replace

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.dead_letters.write import is_submission, letter_facts, submitter_in
from loom.bus.natsio.server_errors import Refused
from loom.bus.queries import latest
from loom.schemas.base import Undecodable, decode
from loom.schemas.dead_letter import DeadLetter
from loom.schemas.envelope import Envelope
from loom.schemas.errors import DeadLettered, LoomError
from loom.schemas.notices import PlanTimeout, read_scale_message
from loom.schemas.task import Submission, TaskAd

_NO_MESSAGE = 10037


class UnknownLetter(LoomError):
    """No dead letter has that sequence."""

    code = "unknown_letter"


class Letter(NamedTuple):
    """A dead letter as the stream DEAD holds it."""

    seq: int
    """Its sequence in DEAD: what it is called by."""
    stored_at: float
    """Server time, seconds since the epoch."""
    facts: DeadLetter
    body: bytes
    """What could not be handled, as it came; cut where `facts.cut` says so."""


async def letters(bus: Bus, limit: int) -> list[Letter]:
    """Return the last `limit` dead letters, the newest at the end.

    Raises:
        Refused: No such stream: no phase has ever run here.
        BusUnavailable: No answer.
    """
    there = await latest(bus, bus.subjects.stream("DEAD"), bus.subjects.of("dead", "*", "*"), limit)
    return [
        Letter(message.seq, message.stored_at, letter_facts(message.headers, message.subject), message.data)
        for message in there.messages
    ]


async def letter(bus: Bus, seq: int) -> Letter:
    """Return one dead letter.

    Raises:
        UnknownLetter: There is none of that sequence, or not any more.
        BusUnavailable: No answer.
    """
    try:
        answer = await bus.jetstream.api(f"STREAM.MSG.GET.{bus.subjects.stream('DEAD')}", {"seq": seq})
    except Refused as error:
        if error.err_code == _NO_MESSAGE:
            raise _unknown(seq) from None
        raise
    message: dict[str, Any] = answer["message"]
    stored_at = datetime.fromisoformat(message["time"]).timestamp()
    facts = letter_facts(_headers(base64.b64decode(message.get("hdrs", ""))), message["subject"])
    return Letter(seq, stored_at, facts, base64.b64decode(message.get("data", "")))


async def drop(bus: Bus, seq: int) -> None:
    """Erase a dead letter.

    Raises:
        UnknownLetter: There is none of that sequence, or not any more.
        BusUnavailable: No answer.
    """
    try:
        await bus.jetstream.api(f"STREAM.MSG.DELETE.{bus.subjects.stream('DEAD')}", {"seq": seq})
    except Refused:
        await letter(bus, seq)  # the server says the same for every failure; this one tells that it is gone
        raise


async def retry(bus: Bus, seq: int) -> str:
    """Hand the task of a dead letter in again, as a new one with its full timeout, and drop the letter.

    A task ends once, and this one has ended. The new one's id follows from the letter: two who retry it at once, or
    one who does so again because an acknowledgement was lost, start one task. The letter goes last.

    Returns:
        The id of the new task.

    Raises:
        UnknownLetter: There is none of that sequence, or not any more.
        DeadLettered: The letter holds no task, or one that makes sense only as a part of another.
        InvalidTask: The ad breaks a rule.
        Overloaded: The intake is full.
        BusUnavailable: No answer.
    """
    dead = await letter(bus, seq)
    ad, submitter = _task_in(bus, dead)
    ad = replace(ad, task_id=_next_id(bus, dead))
    handle = await task_client.publish(bus, ad, deltas=False, submitter=submitter)
    await handle.close()
    with contextlib.suppress(UnknownLetter):  # somebody else who retried it was faster, and it is the same task
        await drop(bus, seq)
    return ad.task_id


def _task_in(bus: Bus, dead: Letter) -> tuple[TaskAd, str]:
    """Return the ad in a dead letter, and its submitter."""
    try:
        if is_submission(bus, dead.facts.subject):
            return decode(dead.body, Submission).ad, submitter_in(bus, dead.facts.subject)
        message = read_scale_message(dead.body)
    except Undecodable as error:
        why = "its bytes were cut" if dead.facts.cut else error.message
        raise DeadLettered(
            f"letter {dead.seq} holds no task that can be read ({why}): see `loom dead show {dead.seq}`, "
            f"then `loom dead rm {dead.seq}`"
        ) from None
    envelope = message.envelope if isinstance(message, PlanTimeout) else message
    if not isinstance(envelope, Envelope):
        raise DeadLettered(
            f"letter {dead.seq} is a notice about task {envelope.task_id} and means nothing without it: "
            "hand that one in again",
            task_id=envelope.task_id,
        )
    if envelope.split is not None:
        raise DeadLettered(
            f"letter {dead.seq} is a part of task {envelope.split.parent} and means nothing without it: "
            "hand that one in again",
            task_id=envelope.task_id,
        )
    return envelope.ad, envelope.submitter


def _next_id(bus: Bus, dead: Letter) -> str:
    """The id of the task a letter becomes; a stream made anew counts from 1 again, but not at the same time."""
    name = f"{bus.subjects.stream('DEAD')}:{dead.seq}:{dead.stored_at}:{dead.facts.task_id}"
    return blake2b(name.encode(errors="replace"), digest_size=16).hexdigest()


def _headers(raw: bytes) -> Mapping[str, str]:
    lines = (line.partition(":") for line in raw.decode(errors="replace").split("\r\n")[1:])
    return {name.strip(): value.strip() for name, colon, value in lines if colon}


def _unknown(seq: int) -> UnknownLetter:
    return UnknownLetter(f"there is no dead letter {seq}; `loom dead ls` lists them")
