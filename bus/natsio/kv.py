"""A typed key-value bucket with compare-and-set; the same layout `nats kv` reads."""

from typing import Generic, NamedTuple, TypeVar

from loom.bus.logs.discards import Discards
from loom.bus.natsio.jetstream import JetStream
from loom.bus.natsio.ordered_consumer import OrderedConsumer
from loom.bus.natsio.server_errors import Conflict, Refused, ServerErrorCode
from loom.schemas.base import Message, Undecodable, decode, new_id

T = TypeVar("T")

_WRITE = "Loom-Write"  # names one write, so that its writer knows it again
_OPERATION = "KV-Operation"
_DELETED = f"{_OPERATION}: "  # what an operator's `nats kv del` leaves behind


class Entry(NamedTuple, Generic[T]):
    """A value and the revision a compare-and-set must name."""

    key: str
    value: T
    revision: int


class _Stored(Message, frozen=True, kw_only=True):
    """What the server holds under a key; in its JSON the bytes are base64."""

    seq: int
    hdrs: bytes = b""
    data: bytes = b""

    def has(self, header: str) -> bool:
        return header.encode() in self.hdrs


class _Got(Message, frozen=True, kw_only=True):
    message: _Stored


class Bucket(Generic[T]):
    """Values of one type under the keys of one bucket.

    Args:
        name: As the server has it.
    """

    def __init__(self, jetstream: JetStream, name: str, shape: type[T]) -> None:
        self._jetstream = jetstream
        self._shape = shape
        self._stream = f"KV_{name}"
        self._prefix = f"$KV.{name}."

    async def get(self, key: str) -> Entry[T] | None:
        """Return the last value of `key`, read from the leader; None when there is none.

        Raises:
            BusUnavailable: No answer.
            Undecodable: The value is not what this bucket holds.
        """
        message = await self._last(key)
        if message is None or message.has(_DELETED):
            return None
        return Entry(key, decode(message.data, self._shape), message.seq)

    async def revision(self, key: str) -> int:
        """Return the revision of `key`, whether its value can be read or not; 0 where there is none."""
        message = await self._last(key)
        return message.seq if message is not None else 0

    async def _last(self, key: str) -> _Stored | None:
        try:
            got = await self._jetstream.api(
                f"STREAM.MSG.GET.{self._stream}", {"last_by_subj": self._prefix + key}, shape=_Got
            )
        except Refused as error:
            if error.err_code == ServerErrorCode.NO_MESSAGE:
                return None
            raise
        return got.message

    async def create(self, key: str, value: T) -> int:
        """Store the first value of `key` and return its revision.

        Raises:
            Conflict: There is one already.
        """
        return await self.update(key, value, 0)

    async def update(self, key: str, value: T, revision: int) -> int:
        """Store `value` if the key still is at `revision`, and return the new revision.

        Raises:
            Conflict: Someone else wrote first; read again and decide again.
        """
        write = new_id()
        headers = {"Nats-Expected-Last-Subject-Sequence": str(revision), _WRITE: write}
        try:
            ack = await self._jetstream.publish(self._prefix + key, value, headers=headers)
        except Conflict:
            # A repeated write whose first acknowledgement was lost conflicts with itself. Equal values prove
            # nothing: two who count the same thing write the same number.
            last = await self._last(key)
            if last is not None and last.has(write):
                return last.seq
            if last is not None and revision == 0 and last.has(_DELETED):
                return await self.update(key, value, last.seq)
            raise
        return ack.seq

    def reader(self, keys: str = ">") -> "BucketReader[T]":
        """Return all values and then every change, in order; `keys` filters as subjects are filtered."""
        return BucketReader(
            OrderedConsumer(self._jetstream, self._stream, filter=self._prefix + keys, deliver="last_per_subject"),
            self._prefix,
            self._shape,
            self._jetstream.discards,
        )


class BucketReader(Generic[T]):
    """Follows a bucket."""

    def __init__(self, reader: OrderedConsumer, prefix: str, shape: type[T], discards: Discards) -> None:
        self._reader = reader
        self._prefix = prefix
        self._shape = shape
        self._discards = discards
        self.unreadable: dict[str, int] = {}
        """Key -> revision of the values of the last batch that cannot be read."""

    async def start(self) -> None:
        """Begin to read, and try again until the server answers."""
        await self._reader.begin()

    async def batch(self) -> list[Entry[T]]:
        """Wait for changes and return those that are there, oldest first; undecodable ones are left out."""
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
        """How often the bucket was lost and another of its name begun."""
        return self._reader.generation

    @property
    def caught_up(self) -> bool:
        """Whether all that was stored when the last batch came has been read."""
        return self._reader.caught_up

    async def stop(self) -> None:
        """Stop following."""
        await self._reader.stop()
