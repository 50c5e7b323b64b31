"""The connection of the floor's programs: messages are published, stored, pulled and acknowledged by callbacks."""

from collections.abc import Callable
from itertools import count

from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.bus.topology import Lane

BATCH = 512
"""Messages that a pull requests."""
WRITE_ID = "0123456789abcdef0123456789abcdef"
OnStored = Callable[[int], None]
"""Called with the sequence of a stored message."""


class FloorClient:
    """Sends payloads as they are on loom's own transport, and waits for nothing."""

    def __init__(self, bus: Bus) -> None:
        self.subjects = bus.subjects
        self.instance = bus.instance
        self.publish = bus.connection._nc.send
        """Publishes (subject, reply, payload, header block)."""
        self._connection = bus.connection
        self._inbox = f"{bus.connection.inbox}.floor"
        self._tokens = count()
        self._unconfirmed: dict[str, OnStored] = {}

    async def start(self) -> None:
        """Subscribe to the acknowledgements of stored messages."""
        await self.subscribe(f"{self._inbox}.ack.*", self._on_stored)

    async def subscribe(self, subject: str, handler: Callable[[Msg], None]) -> None:
        """Call `handler` with each message on `subject`."""
        await self._connection.subscribe_sync(subject, handler)

    def store(self, subject: str, payload: bytes, headers: bytes, on_stored: OnStored) -> None:
        """Publish into a stream, and call `on_stored` once the server has acknowledged the message."""
        reply = f"{self._inbox}.ack.{next(self._tokens)}"
        self._unconfirmed[reply] = on_stored
        self.publish(subject, reply, payload, headers)

    def ack(self, reply: str) -> None:
        """Acknowledge a pulled message."""
        self.publish(reply, "", b"+ACK", b"")

    async def pull(self, lane: Lane, handler: Callable[[Msg], None]) -> None:
        """Call `handler` with each message of a durable consumer; pulls follow each other without a pause."""
        inbox = f"{self._inbox}.pull.{lane.name}"
        api = f"$JS.API.CONSUMER.MSG.NEXT.{self.subjects.stream(lane.stream)}.{lane.name}"
        requested = 0

        def request() -> None:
            nonlocal requested
            requested += BATCH
            self.publish(api, inbox, b'{"batch":%d}' % BATCH, b"")

        def deliver(msg: Msg) -> None:
            nonlocal requested
            if not msg.reply:
                raise RuntimeError(f"a pull was refused: {msg.headers}")
            requested -= 1
            handler(msg)
            if requested <= BATCH // 2:
                request()

        await self.subscribe(inbox, deliver)
        request()

    def _on_stored(self, msg: Msg) -> None:
        if b'"error"' in msg.data or not msg.data:
            raise RuntimeError(f"a message was not stored: {msg.data!r}")
        on_stored = self._unconfirmed.pop(msg.subject)
        on_stored(int(msg.data.partition(b'"seq":')[2].rstrip(b"}").partition(b",")[0]))


def message_id(text: str) -> bytes:
    """Return the header block of a message with an id."""
    return f"NATS/1.0\r\nNats-Msg-Id: {text}\r\n\r\n".encode()


def expected_sequence(sequence: int) -> bytes:
    """Return the header block of a write by compare-and-set."""
    return f"NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: {sequence}\r\nLoom-Write: {WRITE_ID}\r\n\r\n".encode()


def scheduled(target: str, at: str, text: str) -> bytes:
    """Return the header block of a message that the server moves to `target` at a time in RFC 3339."""
    return (
        f"NATS/1.0\r\nNats-Schedule: @at {at}\r\nNats-Schedule-Target: {target}\r\nNats-Msg-Id: {text}\r\n\r\n".encode()
    )
