"""Dead letters for operators: list, get, retry, delete."""

import contextlib
from hashlib import blake2b
from typing import NamedTuple

from msgspec.structs import replace

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.dead_letters.write import is_submission, letter_facts, submitter_in
from loom.bus.natsio.server_errors import Refused
from loom.bus.natsio.stored_message import message_at
from loom.bus.queries import latest
from loom.schemas.base import Undecodable, decode
from loom.schemas.dead_letter import DeadLetter
from loom.schemas.envelope import Envelope
from loom.schemas.errors import DeadLettered, LoomError
from loom.schemas.notices import PlanTimeout, read_scale_message
from loom.schemas.task import Submission, TaskAd


class UnknownLetter(LoomError):
    """The stream DEAD has no message of that sequence."""

    code = "unknown_letter"


class Letter(NamedTuple):
    """A dead letter of the stream DEAD."""

    seq: int
    """Its sequence in DEAD, by which commands name it."""
    stored_at: float
    """Server time, seconds since the epoch."""
    facts: DeadLetter
    body: bytes
    """The body of the message that was not handled; truncated if `facts.cut` is true."""


async def list_letters(bus: Bus, limit: int) -> list[Letter]:
    """Return the newest `limit` dead letters, oldest first.

    Raises:
        Refused: The stream does not exist: no phase has ever run here.
        BusUnavailable: The server does not answer.
    """
    newest = await latest(bus, bus.subjects.stream("DEAD"), bus.subjects.of("dead", "*", "*"), limit)
    return [
        Letter(message.seq, message.stored_at, letter_facts(message.headers, message.subject), message.data)
        for message in newest.messages
    ]


async def get_letter(bus: Bus, seq: int) -> Letter:
    """Return one dead letter.

    Raises:
        UnknownLetter: No dead letter has that sequence; it may have been deleted.
        BusUnavailable: The server does not answer.
    """
    message = await message_at(bus.jetstream, bus.subjects.stream("DEAD"), seq)
    if message is None:
        raise UnknownLetter(f"there is no dead letter {seq}; `loom dead ls` lists them")
    return Letter(seq, message.stored_at, letter_facts(message.headers, message.subject), message.data)


async def delete_letter(bus: Bus, seq: int) -> None:
    """Delete a dead letter.

    Raises:
        UnknownLetter: No dead letter has that sequence; it may have been deleted.
        BusUnavailable: The server does not answer.
    """
    try:
        await bus.jetstream.api(f"STREAM.MSG.DELETE.{bus.subjects.stream('DEAD')}", {"seq": seq})
    except Refused:
        await get_letter(bus, seq)  # raises UnknownLetter; the server has one error for all failures
        raise


async def retry_letter(bus: Bus, seq: int) -> str:
    """Publish the task of a dead letter as a new task with its full timeout, and delete the letter.

    The id of the new task follows from the letter. So two operators who retry it at once start one task, and so does
    a second call after a lost acknowledgement. The letter is deleted last.

    Returns:
        The id of the new task; the old one has ended and keeps its result.

    Raises:
        UnknownLetter: No dead letter has that sequence; it may have been deleted.
        DeadLettered: The letter contains no task, or a subtask, which needs its parent.
        InvalidTask: The ad breaks a rule.
        Overloaded: The intake is full.
        BusUnavailable: The server does not answer.
    """
    letter = await get_letter(bus, seq)
    ad, submitter = _task_in(bus, letter)
    ad = replace(ad, task_id=_retry_id(bus, letter))
    handle = await task_client.publish(bus, ad, deltas=False, submitter=submitter)
    await handle.close()
    with contextlib.suppress(UnknownLetter):  # another operator's retry of this letter started the same task
        await delete_letter(bus, seq)
    return ad.task_id


def _task_in(bus: Bus, letter: Letter) -> tuple[TaskAd, str]:
    """Return the ad in a dead letter, and its submitter."""
    try:
        if is_submission(bus, letter.facts.subject):
            return decode(letter.body, Submission).ad, submitter_in(bus, letter.facts.subject)
        message = read_scale_message(letter.body)
    except Undecodable as error:
        why = "its bytes were cut" if letter.facts.cut else error.message
        raise DeadLettered(
            f"letter {letter.seq} holds no task that can be read ({why}): see `loom dead show {letter.seq}`, "
            f"then `loom dead rm {letter.seq}`"
        ) from None
    envelope = message.envelope if isinstance(message, PlanTimeout) else message
    if not isinstance(envelope, Envelope):
        raise DeadLettered(
            f"letter {letter.seq} is a notice about task {envelope.task_id} and cannot be retried by itself; "
            "submit that task again",
            task_id=envelope.task_id,
        )
    if envelope.split is not None:
        raise DeadLettered(
            f"letter {letter.seq} is a subtask of task {envelope.split.parent} and cannot be retried by itself; "
            "submit that task again",
            task_id=envelope.task_id,
        )
    return envelope.ad, envelope.submitter


def _retry_id(bus: Bus, letter: Letter) -> str:
    """Return the id of the task that retries a letter.

    It includes the time, because sequences start at 1 again when the stream is created again.
    """
    name = f"{bus.subjects.stream('DEAD')}:{letter.seq}:{letter.stored_at}:{letter.facts.task_id}"
    return blake2b(name.encode(errors="replace"), digest_size=16).hexdigest()
