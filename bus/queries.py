"""What the streams still hold, for people who look back: recent records and rewards, and one task wherever it is."""

import base64
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.natsio.ordered_consumer import OrderedConsumer, Stored
from loom.bus.natsio.server_errors import Refused
from loom.bus.records import records
from loom.bus.stored_rewards import reward_in
from loom.schemas.base import Undecodable, decode
from loom.schemas.errors import InvalidTask, UnknownTask
from loom.schemas.learning import Reward
from loom.schemas.notices import envelope_in
from loom.schemas.record import TaskRecord
from loom.schemas.task import Submission
from loom.schemas.tokens import is_token

T = TypeVar("T")

FIRST_LOOK = 512
"""Sequences looked at first for the newest messages; eight times as many each time they are not enough."""
SHORT_ID = 8
_OPERATION = "KV-Operation"
SHORT_AMONG = 5_000
"""Newest records among which a shortened id is looked for."""


class Latest(NamedTuple):
    """Where the stream ended when it was read."""

    messages: list[Stored]
    """Oldest first."""
    last_seq: int


class FoundTask(NamedTuple):
    """A task: its record, or the submission that waits for admission."""

    record: TaskRecord | None
    phase: str
    """The phase whose turn it is; empty when the task has ended or is between two phases."""
    submission: Submission | None = None


def records_stream(bus: Bus) -> tuple[str, str]:
    """Return the stream under the bucket of records, and the subject of all of them."""
    bucket = bus.subjects.bucket("records")
    return f"KV_{bucket}", f"$KV.{bucket}.>"


async def latest(
    bus: Bus, stream: str, subject: str, limit: int, wanted: Callable[[Stored], bool] = lambda _: True
) -> Latest:
    """Return the newest messages of a stream that are wanted, without reading all of it where that can be helped.

    Raises:
        Refused: No such stream.
        BusUnavailable: No answer.
    """
    state = (await bus.jetstream.api(f"STREAM.INFO.{stream}"))["state"]
    first, last, span = state["first_seq"], state["last_seq"], max(FIRST_LOOK, 4 * limit)
    while True:
        start = max(first, last - span + 1)
        found: deque[Stored] = deque(maxlen=limit)
        async for message in _until(OrderedConsumer(bus.jetstream, stream, filter=subject, start_seq=start), last):
            if wanted(message):
                found.append(message)
        if len(found) >= limit or start <= first:
            return Latest(list(found), last)
        span *= 8


async def since(bus: Bus, stream: str, subject: str, at: float) -> AsyncIterator[Stored]:
    """Yield what a stream holds that was stored from server time `at` on, and end.

    Raises:
        Refused: No such stream.
        BusUnavailable: No answer.
    """
    last = (await bus.jetstream.api(f"STREAM.INFO.{stream}"))["state"]["last_seq"]
    start_time = datetime.fromtimestamp(at, UTC).isoformat()
    async with aclosing(
        _until(OrderedConsumer(bus.jetstream, stream, filter=subject, start_time=start_time), last)
    ) as messages:
        async for message in messages:
            yield message


async def between(bus: Bus, stream: str, subject: str, first: int, last: int) -> AsyncIterator[Stored]:
    """Yield what a stream holds from sequence `first` to sequence `last`, and end.

    Raises:
        Refused: No such stream.
        BusUnavailable: No answer.
    """
    async with aclosing(
        _until(OrderedConsumer(bus.jetstream, stream, filter=subject, start_seq=first), last)
    ) as messages:
        async for message in messages:
            yield message


async def _until(reader: OrderedConsumer, last: int) -> AsyncGenerator[Stored, None]:
    """Yield what `reader` finds, to the end of the stream as it was when it was asked about."""
    try:
        while True:
            for message in await reader.batch():
                if message.seq > last:
                    return
                yield message
            if reader.caught_up:
                return
    finally:
        await reader.stop()


async def recent_records(
    bus: Bus, limit: int, wanted: Callable[[TaskRecord], bool] = lambda _: True
) -> list[TaskRecord]:
    """Return the records changed last, newest task first.

    Raises:
        Refused: No such bucket.
        BusUnavailable: No answer.
    """
    found: dict[str, TaskRecord] = {}

    def take(message: Stored) -> bool:
        record = _read(bus, message, TaskRecord)
        if record is None or not wanted(record):
            return False
        found[message.subject] = record
        return True

    stream, subject = records_stream(bus)
    messages = (await latest(bus, stream, subject, limit, take)).messages
    kept = {message.subject: found[message.subject] for message in messages}
    return sorted(kept.values(), key=lambda record: -record.admitted_at)


async def ended_since(bus: Bus, at: float) -> AsyncIterator[TaskRecord]:
    """Yield the records of tasks that ended at server time `at` or later, in the order they ended."""
    async for message in since(bus, *records_stream(bus), at):
        record = _read(bus, message, TaskRecord)
        if record is not None and record.ended_at is not None and record.ended_at >= at:
            yield record


async def rewards_since(bus: Bus, at: float, *, domain_token: str | None = None) -> AsyncIterator[tuple[float, Reward]]:
    """Yield the rewards stored at server time `at` or later, each with that time, in stream order."""
    subject = bus.subjects.of("reward", "*", "*", "*", domain_token or "*")
    async for message in since(bus, bus.subjects.stream("REWARDS"), subject, at):
        reward = reward_in(message, bus.subjects, bus.discards)
        if reward is not None:
            yield message.stored_at, reward


async def find_task(bus: Bus, task_id: str) -> FoundTask:
    """Return what is known of a task, read from the streams themselves: no phase need answer.

    A running task's record comes with its envelope as it is now. Eight digits stand for a recent id that
    begins with them.

    Raises:
        UnknownTask: No task of that id is known.
        InvalidTask: That is not an id.
    """
    if not is_token(task_id):
        raise InvalidTask("task_id must match [A-Za-z0-9_-]{1,64}", field="task_id")
    entry = await records(bus).get(task_id)
    record = entry.value if entry is not None else None
    if record is None:
        submission = await _last(bus, "INTAKE", bus.subjects.intake("*", "*", task_id), _submission_in)
        if submission is not None:
            return FoundTask(None, "", submission[1])
        record = await _recent(bus, task_id)
    if record.ended:
        return FoundTask(record, "")
    return await _under_way(bus, record)


async def _recent(bus: Bus, beginning: str) -> TaskRecord:
    if len(beginning) == SHORT_ID:
        stream, subject = records_stream(bus)
        prefix = subject.removesuffix(">") + beginning
        state = (await bus.jetstream.api(f"STREAM.INFO.{stream}"))["state"]
        reader = OrderedConsumer(
            bus.jetstream, stream, filter=subject, start_seq=max(1, state["last_seq"] - SHORT_AMONG)
        )
        found = [m async for m in _until(reader, state["last_seq"]) if m.subject.startswith(prefix)]
        matches = {message.subject: _read(bus, message, TaskRecord) for message in found}
        if len(matches) == 1 and (record := next(iter(matches.values()))) is not None:
            return record
    raise UnknownTask(f"no task {beginning} is known; records are kept for 72 hours", task_id=beginning)


async def _under_way(bus: Bus, record: TaskRecord) -> FoundTask:
    """The record of a running task with the envelope of the hop it is at."""
    hop = await _last(bus, "TASKS", bus.subjects.of("task", "*", "*", record.task_id), envelope_in)
    if hop is not None:  # after a notice: the parked task itself waits elsewhere
        subject, envelope = hop
        parsed = bus.subjects.parse(subject)
        return FoundTask(replace(record, envelope=envelope), parsed.tokens["phase"] if parsed else "")
    waiting = await _last(bus, "TASKS", bus.subjects.later("*", record.task_id, "*"), envelope_in)
    if waiting is not None:
        return FoundTask(replace(record, envelope=waiting[1]), "later")
    return FoundTask(record, "")


async def _last(bus: Bus, stream: str, subject: str, read: Callable[[bytes], T | None]) -> tuple[str, T] | None:
    """Subject and content of the last message that matches `subject`; None if there is none, or it is unreadable."""
    try:
        answer = await bus.jetstream.api(f"STREAM.MSG.GET.{bus.subjects.stream(stream)}", {"last_by_subj": subject})
    except Refused:
        return None
    message = answer["message"]
    content = read(base64.b64decode(message.get("data", "")))
    return None if content is None else (message["subject"], content)


def _submission_in(raw: bytes) -> Submission | None:
    try:
        return decode(raw, Submission)
    except Undecodable:
        return None


def _read(bus: Bus, message: Stored, shape: type[T]) -> T | None:
    """The message as a `shape`; None for what its writers did not mean to be one."""
    try:
        return decode(message.data, shape)
    except Undecodable as error:
        if _OPERATION not in message.headers:  # else the key was deleted
            bus.discards.add("message_undecodable", reason=error.message, subject=message.subject)
        return None
