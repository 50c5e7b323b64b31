"""A typed key-value bucket with compare-and-set, in the layout of the `nats kv` command."""

import asyncio
import random
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from loom.bus.logs.discards import Discards
from loom.bus.natsio.jetstream import JetStream
from loom.bus.natsio.ordered_consumer import OrderedConsumer
from loom.bus.natsio.server_errors import Conflict, Refused, ServerErrorCode
from loom.schemas.base import Message, Undecodable, decode, new_id
from loom.schemas.errors import BusUnavailable

T = TypeVar("T")

TRIES = 16
"""Writes of one `update_with`: the writers of one key are few, so that more conflicts are not contention."""
PAUSE_S = 0.01
"""Longest pause after a conflict; its length is random, so that writers in conflict do not meet again."""

_WRITE = "Loom-Write"
"""Header with a random id, by which a writer recognises its own write."""
_OPERATION = "KV-Operation"
_DELETED = f"{_OPERATION}: "
"""Beginning of the header that `nats kv del` writes."""


class Entry(NamedTuple, Generic[T]):
    """A value and its revision, which a compare-and-set must state."""

    key: str
    value: T
    revision: int


class _StoredValue(Message, frozen=True, kw_only=True):
    """The message that the server stores under a key; its JSON has the bytes in base64."""

    seq: int
    hdrs: bytes = b""
    data: bytes = b""

    def has(self, header: str) -> bool:
        return header.encode() in self.hdrs


class _GetReply(Message, frozen=True, kw_only=True):
    message: _StoredValue


class Bucket(Generic[T]):
    """The values of one key-value bucket, which have one type.

    Args:
        name: Name of the bucket on the server, for example `loom_records`.
        shape: Type of the values.
    """

    def __init__(self, jetstream: JetStream, name: str, shape: type[T]) -> None:
        self._jetstream = jetstream
        self._name = name
        self._shape = shape
        self._stream = f"KV_{name}"
        self._prefix = f"$KV.{name}."

    async def get(self, key: str) -> Entry[T] | None:
        """Return the last value of `key`, read from the leader; None if the key has no value.

        Raises:
            BusUnavailable: The server does not answer.
            Undecodable: The value does not have the bucket's type.
        """
        message = await self._last(key)
        if message is None or message.has(_DELETED):
            return None
        return Entry(key, decode(message.data, self._shape), message.seq)

    async def revision(self, key: str) -> int:
        """Return the revision of `key`, also of a value that cannot be decoded; 0 if the key does not exist."""
        message = await self._last(key)
        return message.seq if message is not None else 0

    async def _last(self, key: str) -> _StoredValue | None:
        try:
            reply = await self._jetstream.api(
                f"STREAM.MSG.GET.{self._stream}", {"last_by_subj": self._prefix + key}, shape=_GetReply
            )
        except Refused as error:
            if error.err_code == ServerErrorCode.NO_MESSAGE:
                return None
            raise
        return reply.message

    async def create(self, key: str, value: T) -> int:
        """Store the first value of `key` and return its revision.

        Raises:
            Conflict: The key has a value already.
        """
        return await self.update(key, value, 0)

    async def update(self, key: str, value: T, revision: int) -> int:
        """Store `value` if the key still is at `revision`, and return the new revision.

        Raises:
            Conflict: Another writer has stored a value since `revision`.
        """
        write = new_id()
        headers = {"Nats-Expected-Last-Subject-Sequence": str(revision), _WRITE: write}
        try:
            ack = await self._jetstream.publish(self._prefix + key, value, headers=headers)
        except Conflict:
            # A repeated write whose first acknowledgement was lost conflicts with itself. Equal values prove
            # nothing: two writers that count the same thing write the same number.
            last = await self._last(key)
            if last is not None and last.has(write):
                return last.seq
            if last is not None and revision == 0 and last.has(_DELETED):
                return await self.update(key, value, last.seq)
            raise
        return ack.seq

    async def update_with(
        self, key: str, decide: Callable[[T], T | None], assumed: Entry[T] | None = None
    ) -> Entry[T] | None:
        """Change the value of `key` by compare-and-set; decide again on the new value after each conflict.

        Args:
            decide: Pure function of the value; returns the new value, or None to store nothing.
            assumed: Entry for the first try, which then needs no read. If it is outdated, the write conflicts.

        Returns:
            The entry as it is now; None if the key has no value.

        Raises:
            BusUnavailable: The server does not answer, or 16 writes in a row conflicted.
            Undecodable: The value does not have the bucket's type.
        """
        entry = assumed
        for _ in range(TRIES):
            entry = entry or await self.get(key)
            if entry is None:
                return None
            value = decide(entry.value)
            if value is None:
                return entry
            try:
                return Entry(key, value, await self.update(key, value, entry.revision))
            except Conflict:
                entry = None
                await asyncio.sleep(random.uniform(0, PAUSE_S))  # noqa: S311 - jitter
        raise BusUnavailable(f"gave up updating {key} in bucket {self._name} after {TRIES} conflicting writes")

    def reader(self, keys: str = ">") -> "BucketReader[T]":
        """Return a reader of all values and then of every change, in order.

        Args:
            keys: Filter of the keys, with the wildcards of subjects.
        """
        return BucketReader(
            OrderedConsumer(self._jetstream, self._stream, filter=self._prefix + keys, deliver="last_per_subject"),
            self._prefix,
            self._shape,
            self._jetstream.discards,
        )


class BucketReader(Generic[T]):
    """Reads the values of a bucket and follows their changes."""

    def __init__(self, reader: OrderedConsumer, prefix: str, shape: type[T], discards: Discards) -> None:
        self._reader = reader
        self._prefix = prefix
        self._shape = shape
        self._discards = discards
        self.unreadable: dict[str, int] = {}
        """Key -> revision of each value of the last batch that cannot be decoded."""

    async def start(self) -> None:
        """Start to read; retried until the server answers."""
        await self._reader.begin()

    async def batch(self) -> list[Entry[T]]:
        """Wait for changes and return all that have arrived, oldest first; values that cannot be decoded are left out.

        Deleted keys are left out, too.
        """
        entries, self.unreadable = [], {}
        for message in await self._reader.batch():
            key = message.subject.removeprefix(self._prefix)
            if _OPERATION in message.headers:
                continue  # the key was deleted
            try:
                value = decode(message.data, self._shape)
            except Undecodable as error:
                self._discards.add("value_undecodable", reason=error.message, subject=message.subject)
                self.unreadable[key] = message.seq
                continue
            entries.append(Entry(key, value, message.seq))
        return entries

    @property
    def generation(self) -> int:
        """How often the bucket was deleted and another one of its name created."""
        return self._reader.generation

    @property
    def caught_up(self) -> bool:
        """Whether the last batch ended with the newest value that was stored at that time."""
        return self._reader.caught_up

    async def stop(self) -> None:
        """Stop following the bucket."""
        await self._reader.stop()
