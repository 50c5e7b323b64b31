"""Queries over the streams for operators: recent records and rewards, and the current state of one task."""

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.natsio.ordered_consumer import OrderedConsumer
from loom.bus.natsio.server_errors import Refused
from loom.bus.natsio.stored_message import StoredMessage, last_message
from loom.bus.records import records
from loom.bus.stored_rewards import reward_in
from loom.schemas.base import Undecodable, decode
from loom.schemas.errors import InvalidTask, UnknownTask
from loom.schemas.learning.reward import Reward
from loom.schemas.notices import envelope_in
from loom.schemas.record import TaskRecord
from loom.schemas.task import Submission
from loom.schemas.tokens import is_token

T = TypeVar("T")

FIRST_SPAN = 512
"""Sequences of the first read for the newest messages; each further read spans eight times as many."""
RECENT_RECORDS = 5_000
"""Newest records that `recent_ids` searches."""
_OPERATION = "KV-Operation"


class Latest(NamedTuple):
    """The newest messages of a stream, and its end at the time they were read."""

    messages: list[StoredMessage]
    """Oldest first."""
    last_seq: int


class FoundTask(NamedTuple):
    """A task: its record, or the submission that waits for admission."""

    record: TaskRecord | None
    phase: str
    """The phase that has the task next; empty when the task has ended or is between two phases."""
    submission: Submission | None = None


def records_stream(bus: Bus) -> tuple[str, str]:
    """Return the stream under the bucket of records, and the subject of all its messages."""
    bucket = bus.subjects.bucket("records")
    return f"KV_{bucket}", f"$KV.{bucket}.>"


async def latest(
    bus: Bus, stream: str, subject: str, limit: int, matches: Callable[[StoredMessage], bool] = lambda _: True
) -> Latest:
    """Return the newest `limit` messages of a stream that match, reading backwards in spans of growing length.

    Args:
        matches: Whether a message on `subject` matches.

    Raises:
        Refused: The stream does not exist.
        BusUnavailable: The server does not answer.
    """
    state = (await bus.jetstream.api(f"STREAM.INFO.{stream}"))["state"]
    first, last, span = state["first_seq"], state["last_seq"], max(FIRST_SPAN, 4 * limit)
    while True:
        start = max(first, last - span + 1)
        messages: deque[StoredMessage] = deque(maxlen=limit)
        async for message in _until(OrderedConsumer(bus.jetstream, stream, filter=subject, start_seq=start), last):
            if matches(message):
                messages.append(message)
        if len(messages) >= limit or start <= first:
            return Latest(list(messages), last)
        span *= 8


async def since(bus: Bus, stream: str, subject: str, at: float) -> AsyncIterator[StoredMessage]:
    """Yield the messages that a stream stored at server time `at` or later, up to its present end.

    Raises:
        Refused: The stream does not exist.
        BusUnavailable: The server does not answer.
    """
    last = (await bus.jetstream.api(f"STREAM.INFO.{stream}"))["state"]["last_seq"]
    start_time = datetime.fromtimestamp(at, UTC).isoformat()
    async with aclosing(
        _until(OrderedConsumer(bus.jetstream, stream, filter=subject, start_time=start_time), last)
    ) as messages:
        async for message in messages:
            yield message


async def between(bus: Bus, stream: str, subject: str, first: int, last: int) -> AsyncGenerator[StoredMessage, None]:
    """Yield the messages of a stream from sequence `first` to sequence `last`.

    Raises:
        Refused: The stream does not exist.
        BusUnavailable: The server does not answer.
    """
    async with aclosing(
        _until(OrderedConsumer(bus.jetstream, stream, filter=subject, start_seq=first), last)
    ) as messages:
        async for message in messages:
            yield message


async def _until(consumer: OrderedConsumer, last: int) -> AsyncGenerator[StoredMessage, None]:
    """Yield the messages of `consumer` up to sequence `last`, and stop it."""
    try:
        while True:
            for message in await consumer.batch():
                if message.seq > last:
                    return
                yield message
            if consumer.caught_up:
                return
    finally:
        await consumer.stop()


async def recent_records(
    bus: Bus, limit: int, matches: Callable[[TaskRecord], bool] = lambda _: True
) -> list[TaskRecord]:
    """Return the `limit` records that changed last and match, newest task first.

    Raises:
        Refused: The bucket does not exist.
        BusUnavailable: The server does not answer.
    """
    by_subject: dict[str, TaskRecord] = {}

    def is_match(message: StoredMessage) -> bool:
        record = _read(bus, message, TaskRecord)
        if record is None or not matches(record):
            return False
        by_subject[message.subject] = record
        return True

    stream, subject = records_stream(bus)
    messages = (await latest(bus, stream, subject, limit, is_match)).messages
    newest = {message.subject: by_subject[message.subject] for message in messages}
    return sorted(newest.values(), key=lambda record: -record.admitted_at)


async def recent_ids(bus: Bus, prefix: str) -> list[str]:
    """Return the ids that begin with `prefix` among the 5,000 records that changed last.

    Raises:
        Refused: The bucket does not exist.
        BusUnavailable: The server does not answer.
    """
    stream, subject = records_stream(bus)
    last = (await bus.jetstream.api(f"STREAM.INFO.{stream}"))["state"]["last_seq"]
    keys = subject.removesuffix(">")
    first = max(1, last - RECENT_RECORDS)
    ids = [message.subject.removeprefix(keys) async for message in between(bus, stream, subject, first, last)]
    return sorted({task_id for task_id in ids if task_id.startswith(prefix)})


async def ended_since(bus: Bus, at: float) -> AsyncIterator[TaskRecord]:
    """Yield the records of tasks that ended at server time `at` or later, in the order in which they ended."""
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
    """Return the state of a task, read from the streams themselves: no phase needs to run.

    The record of a running task contains its envelope as of the last hop.

    Raises:
        UnknownTask: Neither a record nor a submission has that id.
        InvalidTask: `task_id` is not an id.
    """
    if not is_token(task_id):
        raise InvalidTask("task_id must match [A-Za-z0-9_-]{1,64}", field="task_id")
    entry = await records(bus).get(task_id)
    if entry is None:
        submission = await _last(bus, "INTAKE", bus.subjects.intake("*", "*", task_id), _submission_in)
        if submission is None:
            raise UnknownTask(f"no task {task_id} is known; records are kept for 72 hours", task_id=task_id)
        return FoundTask(None, "", submission[1])
    if entry.value.ended:
        return FoundTask(entry.value, "")
    return await _with_last_hop(bus, entry.value)


async def _with_last_hop(bus: Bus, record: TaskRecord) -> FoundTask:
    """Return the record of a running task with the envelope of its last hop."""
    hop = await _last(bus, "TASKS", bus.subjects.of("task", "*", "*", record.task_id), envelope_in)
    if hop is not None:  # else the hop is a notice: the parked task waits under its schedule
        subject, envelope = hop
        parsed = bus.subjects.parse(subject)
        return FoundTask(replace(record, envelope=envelope), parsed.tokens["phase"] if parsed else "")
    scheduled = await _last(bus, "TASKS", bus.subjects.later("*", record.task_id, "*"), envelope_in)
    if scheduled is not None:
        return FoundTask(replace(record, envelope=scheduled[1]), "later")
    return FoundTask(record, "")


async def _last(bus: Bus, stream: str, subject: str, read: Callable[[bytes], T | None]) -> tuple[str, T] | None:
    """Return subject and content of the last message that matches `subject`; None without one that can be read."""
    try:
        message = await last_message(bus.jetstream, bus.subjects.stream(stream), subject)
    except Refused:
        return None
    content = read(message.data) if message is not None else None
    return None if message is None or content is None else (message.subject, content)


def _submission_in(raw: bytes) -> Submission | None:
    try:
        return decode(raw, Submission)
    except Undecodable:
        return None


def _read(bus: Bus, message: StoredMessage, shape: type[T]) -> T | None:
    """Return the content of a message; None for a deleted key, and for an undecodable message, which is counted."""
    try:
        return decode(message.data, shape)
    except Undecodable as error:
        if _OPERATION not in message.headers:  # else the key was deleted
            bus.discards.add("message_undecodable", reason=error.message, subject=message.subject)
        return None
