"""nats-py with a faster path for messages: parsed in place, handled immediately, written once per loop iteration.

Connecting, reconnecting, pings and errors are left to nats-py. For each message nats-py runs five regular expressions,
parses the headers into a dict, uses a queue and a task per subscription, and wakes another task to flush. That costs
several times as much as a hop itself.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Any

from nats.aio.subscription import Subscription
from nats.errors import BadSubjectError, ConnectionClosedError, OutboundBufferLimitError, ProtocolError
from nats.protocol.parser import Parser

from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.transport.addresses import Address
from loom.bus.natsio.transport.handshake import HandshakeClient
from loom.bus.natsio.transport.message import Msg
from loom.bus.natsio.transport.resolver import Resolver

log = get_logger()

CONGESTED_BYTES = 2 * 2**20
"""Unsent bytes above which `Connection.publish` waits for the socket."""
MAX_LINE = 4096
"""Most bytes of a line of the protocol, except INFO and -ERR."""

SyncHandler = Callable[[Msg], None]


class FastParser(Parser):
    """Parses messages in place; all other lines of the protocol are left to nats-py's parser."""

    def __init__(self, nc: "FastClient") -> None:
        super().__init__(nc)
        self._deliver = nc.deliver
        self._rest = b""

    def reset(self) -> None:
        """Drop the incomplete message that was received last."""
        super().reset()
        self._rest = b""

    async def parse(self, data: bytes = b"") -> None:
        """Deliver every complete message, and keep the incomplete rest for the next call.

        Raises:
            ProtocolError: The data does not belong to the NATS protocol.
        """
        if self._rest:
            data = self._rest + data
        position, size = 0, len(data)
        while position < size:
            end = data.find(b"\r\n", position)
            if end < 0:
                if size - position > MAX_LINE and not data.startswith((b"INFO", b"-ERR"), position):
                    raise ProtocolError("nats: a line without an end")
                break
            line = data[position:end]
            if line.startswith((b"MSG ", b"HMSG ")):
                arguments = line.split()
                start = end + 2
                stop = start + int(arguments[-1])
                if stop + 2 > size:
                    break
                position = stop + 2
                if line[0] == _PLAIN:
                    reply = arguments[3] if len(arguments) == 5 else b""  # noqa: PLR2004 - MSG subject sid reply size
                    self._deliver(int(arguments[2]), arguments[1], reply, data[start:stop], b"")
                else:
                    body = start + int(arguments[-2])
                    reply = arguments[3] if len(arguments) == 6 else b""  # noqa: PLR2004 - and the headers' size
                    self._deliver(int(arguments[2]), arguments[1], reply, data[body:stop], data[start:body])
            else:
                position = end + 2
                await super().parse(line + b"\r\n")
        self._rest = data[position:]


_PLAIN = ord("M")
_breaks = re.compile(r"[\s\x00]").search


class FastClient(HandshakeClient):
    """A client of nats-py with a faster path for received and sent messages."""

    def __init__(
        self,
        addresses: Sequence[Address] = (),
        resolver: Resolver | None = None,
        failures: dict[str, Exception] | None = None,
    ) -> None:
        super().__init__(addresses, resolver, failures)
        self._ps = FastParser(self)
        self._handlers: dict[int, SyncHandler] = {}
        self._writing = False
        self.is_congested = False
        """Whether more than CONGESTED_BYTES are unsent; `wait_until_writable` waits for the socket."""

    # -- receiving

    async def subscribe_sync(self, subject: str, handler: SyncHandler, *, queue: str = "") -> Subscription:
        """Call `handler` with every message as it is read, in order; it must be quick, and must not block."""
        subscription = await self.subscribe(subject, queue=queue)
        self._handlers[subscription._id] = handler
        return subscription

    def end_subscription(self, subscription: Subscription) -> None:
        """End a subscription without waiting, and drop messages that wait for its handler. Safe to call twice."""
        if subscription._closed:
            return
        subscription._closed = True
        subscription._stop_processing()
        self._remove_sub(subscription._id)
        if not self.is_closed:  # while reconnecting, too: its SUB may still wait to be sent
            command = b"UNSUB %d\r\n" % subscription._id
            self._pending.append(command)
            self._pending_data_size += len(command)
            if not self._writing:
                self._schedule_write()

    def deliver(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        """Call the synchronous handler of a subscription, or put the message into the subscription's queue."""
        subscription = self._subs.get(sid)
        if subscription is None:
            return  # unsubscribed
        msg = Msg(subject.decode(errors="replace"), reply.decode(errors="replace"), data, headers)
        handler = self._handlers.get(sid)
        if handler is not None:
            try:
                handler(msg)
            except Exception as error:  # noqa: BLE001 - it would end the read loop
                log.error("handler_failed", subject=msg.subject, **error_fields(error))
            return
        if subscription._pending_queue.full():
            log.warning("slow_consumer", subject=msg.subject)
            return
        subscription._pending_size += len(data)
        subscription._pending_queue.put_nowait(msg)  # type: ignore[arg-type]  # read only here and by our handlers

    async def _process_connect_init(self) -> None:
        """Start the handshake of a connection, and drop the incomplete message of the previous one."""
        self._ps.reset()
        await super()._process_connect_init()

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        super()._remove_sub(sid, max_msgs)
        self._handlers.pop(sid, None)

    # -- sending

    def send(self, subject: str, reply: str, payload: bytes, headers: bytes) -> None:
        """Send a message at the end of this iteration of the event loop, or after a reconnect.

        Args:
            headers: A complete header block, or empty.

        Raises:
            BadSubjectError: The subject is empty, or a subject contains white space or a zero byte.
            ConnectionClosedError: The connection is closed for good.
            OutboundBufferLimitError: The connection is lost, and the buffer of unsent messages is full.
        """
        if not subject or _breaks(subject + reply):
            raise BadSubjectError
        size = len(payload)
        if not self.is_connected:
            if self.is_closed:
                raise ConnectionClosedError
            if self._pending_data_size + size > self._max_pending_size:
                raise OutboundBufferLimitError
        if headers:
            command = b"HPUB %b %b %d %d\r\n%b%b\r\n" % (
                subject.encode(),
                reply.encode(),
                len(headers),
                len(headers) + size,
                headers,
                payload,
            )
        else:
            command = b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply.encode(), size, payload)
        self._pending.append(command)
        self._pending_data_size += len(command)
        if not self._writing:
            self._schedule_write()

    async def wait_until_writable(self) -> None:
        """Wait until the socket has accepted most of the unsent bytes, at most for nats-py's flush timeout."""
        try:
            async with asyncio.timeout(self._flush_timeout):
                while self.is_congested and self._transport is not None:
                    await self._transport.drain()  # type: ignore[no-untyped-call]
                    self.is_congested = False
        except (TimeoutError, OSError):
            log.warning("socket_congested")

    def _schedule_write(self) -> None:
        self._writing = True
        asyncio.get_running_loop().call_soon(self._write_out)

    def _write_out(self) -> None:
        self._writing = False
        if not self._pending or not self.is_connected or self._transport is None:
            return  # sent after the reconnect, before anything else
        writer: asyncio.StreamWriter = self._transport._io_writer  # type: ignore[attr-defined]  # of TCP and of TLS
        if writer.is_closing():
            return  # the connection is lost; uvloop would raise
        pending, self._pending, self._pending_data_size = self._pending, [], 0
        writer.write(b"".join(pending))
        self.is_congested = writer.transport.get_write_buffer_size() > CONGESTED_BYTES

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        """Send what is pending, without waking a task as nats-py does."""
        if force_flush or not self.is_connected:
            return await super()._flush_pending(force_flush)
        if not self._writing:
            self._schedule_write()
        return None
