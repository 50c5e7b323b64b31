"""nats-py with a lean path for messages: parsed in place, handed over at once, written once per turn of the loop.

Connecting, reconnecting, pings and errors stay nats-py's. What it does for each message (five regular expressions, a
parsed dict of headers, a queue and a task for each subscription, a flush that wakes another task) costs several times
what a hop itself does.
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

CLOGGED_BYTES = 2 * 2**20
"""Unsent bytes beyond which whoever publishes waits for the socket."""
MAX_LINE = 4096

SyncHandler = Callable[[Msg], None]


class FastParser(Parser):
    """Reads messages in place; every other line of the protocol is nats-py's parser's."""

    def __init__(self, nc: "FastClient") -> None:
        super().__init__(nc)
        self._deliver = nc.deliver
        self._rest = b""

    def reset(self) -> None:
        """Forget what has come of a message that is not complete."""
        super().reset()
        self._rest = b""

    async def parse(self, data: bytes = b"") -> None:
        """Hand over every message that is complete.

        Raises:
            ProtocolError: This is not what a nats-server says.
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
    """A client of nats-py with a faster path for messages, received and sent."""

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
        self.clogged = False
        """Whether the socket takes less than is sent: `unclog` waits."""

    # -- what comes in

    async def listen(self, subject: str, handler: SyncHandler, *, queue: str = "") -> Subscription:
        """Call `handler` with every message as it is read, in order: it must be quick, and not block."""
        subscription = await self.subscribe(subject, queue=queue)
        self._handlers[subscription._id] = handler
        return subscription

    def end_subscription(self, subscription: Subscription) -> None:
        """End a subscription without waiting; messages that wait for its handler are dropped. Safe to call twice."""
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
        """Hand a message over: at once to a listener, else into its subscription's queue."""
        subscription = self._subs.get(sid)
        if subscription is None:
            return  # unsubscribed meanwhile
        msg = Msg(subject.decode(errors="replace"), reply.decode(errors="replace"), data, headers)
        handler = self._handlers.get(sid)
        if handler is not None:
            try:
                handler(msg)
            except Exception as error:  # noqa: BLE001 - an escaping one would end the read loop
                log.error("handler_failed", subject=msg.subject, **error_fields(error))
            return
        if subscription._pending_queue.full():
            log.warning("slow_consumer", subject=msg.subject)
            return
        subscription._pending_size += len(data)
        subscription._pending_queue.put_nowait(msg)  # type: ignore[arg-type]  # only this file and our handlers read it

    async def _process_connect_init(self) -> None:
        """Begin a connection; what was read of the last one while that was given up is forgotten."""
        self._ps.reset()
        await super()._process_connect_init()

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        super()._remove_sub(sid, max_msgs)
        self._handlers.pop(sid, None)

    # -- what goes out

    def send(self, subject: str, reply: str, payload: bytes, headers: bytes) -> None:
        """Send when this turn of the event loop is over, or once connected again.

        Args:
            headers: A whole header block, or nothing.

        Raises:
            BadSubjectError: The subject is empty, or the protocol would take a part of it for something else.
            ConnectionClosedError: The connection is closed for good.
            OutboundBufferLimitError: The connection is lost, and what waits for its return is too much already.
        """
        if not subject or _breaks(subject) or _breaks(reply):
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

    async def unclog(self) -> None:
        """Wait until the socket has taken most of what was sent, at most as long as nats-py does for a flush."""
        try:
            async with asyncio.timeout(self._flush_timeout):
                while self.clogged and self._transport is not None:
                    await self._transport.drain()  # type: ignore[no-untyped-call]
                    self.clogged = False
        except (TimeoutError, OSError):
            log.warning("bus_clogged")

    def _schedule_write(self) -> None:
        self._writing = True
        asyncio.get_running_loop().call_soon(self._write_out)

    def _write_out(self) -> None:
        self._writing = False
        if not self._pending or not self.is_connected or self._transport is None:
            return  # reconnected, it is sent before anything else
        writer: asyncio.StreamWriter = self._transport._io_writer  # type: ignore[attr-defined]  # of TCP and of TLS
        if writer.is_closing():
            return  # lost, which nats-py is about to notice; uvloop would raise
        pending, self._pending, self._pending_data_size = self._pending, [], 0
        writer.write(b"".join(pending))
        self.clogged = writer.transport.get_write_buffer_size() > CLOGGED_BYTES

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        """Send what waits; nats-py wakes a task for it."""
        if force_flush or not self.is_connected:
            return await super()._flush_pending(force_flush)
        if not self._writing:
            self._schedule_write()
        return None
