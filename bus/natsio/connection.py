"""One connection to a nats-server, hardened against faults seen in nats-py: the only place that makes one."""

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

import nats.errors
from nats.aio.subscription import Subscription

from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.background_tasks import BackgroundTasks, ServiceFailed
from loom.bus.natsio.ownership import Owner, keep_forever, running_loop
from loom.bus.natsio.transport.addresses import Address, parse_addresses, shown, tls_wanted
from loom.bus.natsio.transport.connect_causes import Cause, cause_of
from loom.bus.natsio.transport.connecting import Connector, abort_client, close_client, harden_socket
from loom.bus.natsio.transport.fast_client import FastClient, SyncHandler
from loom.bus.natsio.transport.message import Msg, format_headers
from loom.schemas.base import encode
from loom.schemas.errors import BusUnavailable, LoomError

__all__ = ["Connection", "PayloadTooLarge", "Subscription"]

log = get_logger()

WATCH_S = 1.0

Handler = Callable[[Msg], Awaitable[None]]


class PayloadTooLarge(LoomError):
    """A message over the server's limit, refused here because the server would cut the connection for good."""

    code = "invalid_task"


class Connection:
    """One connection: its life, and messages that are published and received at most once.

    Args:
        url: Servers, comma separated.
        name: Of the connection, as the server lists it.
        inbox: Prefix of the reply subjects.
        patience_s: How long `connect` tries.
        is_known_error: Called with each error the server reports; True: it needs no line in the log.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        inbox: str,
        patience_s: float = 2.0,
        is_known_error: Callable[[Exception], bool] = lambda _error: False,
    ) -> None:
        self.url = url
        self._addresses: tuple[Address, ...] = ()
        self.address = "the servers of NATS_URL"
        """The servers without credentials, for messages and logs."""
        with suppress(BusUnavailable):  # raised by `connect`
            self._addresses = parse_addresses(url)
            self.address = shown(self._addresses)
        self.inbox = inbox
        self.tasks = BackgroundTasks()
        self._connector = Connector(self._addresses, self.address, patience_s, self._options(name))
        self._nc = self._connector.client
        self._is_known_error = is_known_error
        self._causes_logged: set[str] = set()
        self._reconnected_at = -math.inf
        self._closing = False
        self._established = False
        """Whether there has been a connection."""
        self._refusals = 0
        """In a row, since the connection was lost."""
        self._reconnected: list[Callable[[], None]] = []
        self._owner: Owner | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        """Its owner's, compared with the running one at each message."""
        _connections.add(self)

    def _options(self, name: str) -> Mapping[str, Any]:
        return {
            "name": name,
            "inbox_prefix": self.inbox,
            "error_cb": self._on_error,
            "disconnected_cb": self._on_disconnect,
            "reconnected_cb": self._on_reconnect,
            "closed_cb": self._on_close,
        }

    # -- lifecycle

    async def connect(self) -> Self:
        """Connect, trying for `patience_s`.

        Raises:
            BusUnavailable: No server could be connected to; the message contains the cause and the remedy.
            WrongEventLoop: The connection is open in another event loop.
        """
        parse_addresses(self.url)
        self._check_free()
        self._owner = Owner("connection")
        self._loop = self._owner.loop
        self._established = False
        self._nc = await self._connector.connect()
        self._established = True
        harden_socket(self._nc)
        self.tasks.spawn(self._watch(), name="bus-watch", essential=True)
        return self

    async def close(self) -> None:
        """Close the connection; safe to call twice or before `connect`.

        Raises:
            WrongEventLoop: The connection is open in another event loop.
        """
        self._check_free()
        self._closing = self.tasks.ending = True
        await self.tasks.end()
        await close_client(self._connector.client)

    def abort(self) -> None:
        """Drop the connection at once, from synchronous code; what is unsent is lost."""
        self._closing = self.tasks.ending = True
        abort_client(self._connector.client, self.tasks.running())

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def loss(self) -> LoomError:
        """Return why `tasks.lost` is set: an essential task has failed, or the connection was closed for good."""
        if self.tasks.failure:
            return ServiceFailed(
                f"an essential task has failed ({self.tasks.failure}); see the log, then start it again"
            )
        return BusUnavailable("the connection to the server was closed for good", url=self.address)

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection just now."""
        return self._nc.is_connected

    @property
    def is_closed(self) -> bool:
        """Whether the connection is closed for good."""
        return self._nc.is_closed

    @property
    def closing(self) -> bool:
        """Whether the connection is being closed, or has been, on purpose."""
        return self._closing

    @property
    def is_unread(self) -> bool:
        """Whether the connection is not read any more: its reader is cancelled when an event loop ends."""
        reading = self._nc._reading_task
        return self._nc.is_connected and reading is not None and bool(reading.done() or reading.cancelling())

    @property
    def settled_s(self) -> float:
        """Seconds since the connection was lost and made again: others may be on their way back still.

        0 while it is lost, without end when it never was.
        """
        return time.monotonic() - self._reconnected_at if self._nc.is_connected else 0.0

    @property
    def server_version(self) -> tuple[int, ...]:
        """The server's version, for example (2, 15, 1)."""
        version = self._nc.connected_server_version
        return (version.major, version.minor, version.patch)

    @property
    def server_count(self) -> int:
        """How many servers are known."""
        return len(self._nc.servers)

    # -- ownership

    def check_loop(self) -> None:
        """Check as `check_owner` does, at less cost; a fork is not noticed before the event loop has ended."""
        if running_loop() is not self._loop:
            self.check_owner()

    def check_owner(self) -> None:
        """Return if the connection was opened in the running event loop and in this process.

        Raises:
            WrongEventLoop: It was opened in another event loop.
            BusUnavailable: It was not opened in this process.
        """
        if self._owner is None:
            raise BusUnavailable("the connection is not open in this process; call connect() first", url=self.address)
        self._owner.check()

    def _check_free(self) -> None:
        """Return unless the connection is open in another living event loop."""
        if self._owner is not None and self._owner.lives and not self._nc.is_closed:
            self._owner.check()

    def _detach(self) -> None:
        """Refuse every further call, in a forked child: sockets and selector are the parent's."""
        keep_forever(self.__dict__.copy())
        self._owner = self._loop = None
        self._connector.client = self._nc = FastClient()

    # -- publishing

    async def publish(
        self, subject: str, message: Any = b"", *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Publish at most once; bytes go as they are, anything else as JSON.

        Raises:
            PayloadTooLarge: Body and headers are over the server's limit.
            BusUnavailable: The connection is gone, or its buffer is full.
        """
        self.publish_nowait(subject, message, reply=reply, headers=headers)
        if self._nc.clogged:
            await self._nc.unclog()

    def publish_nowait(
        self, subject: str, message: Any = b"", *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Publish from code that cannot wait. A caller with many messages uses `publish`, which waits for the socket.

        Raises:
            PayloadTooLarge: Body and headers are over the server's limit.
            BusUnavailable: The connection is gone, or its buffer is full.
            WrongEventLoop: The connection is open in another event loop.
        """
        if running_loop() is not self._loop:  # as `check_loop`, without a call: this is done for every message
            self.check_owner()
        payload = message if isinstance(message, bytes) else encode(message)
        block = format_headers(headers) if headers else b""
        if len(payload) + len(block) > self._nc.max_payload:
            size = len(payload) + len(block)
            raise PayloadTooLarge(f"a message of {size} bytes; the server takes {self._nc.max_payload}")
        try:
            self._nc.send(subject, reply, payload, block)
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot publish: {error}", url=self.address) from error

    async def wait_until_writable(self) -> None:
        """Return once the socket takes more: at once, unless much was published without waiting."""
        if self._nc.clogged:
            await self._nc.unclog()

    # -- subscribing

    async def subscribe_sync(self, subject: str, handler: SyncHandler, *, queue: str = "") -> Subscription:
        """Call `handler` with every message on `subject` the moment it is read: it must be quick, and cannot wait.

        Raises:
            BusUnavailable: The connection is gone.
            WrongEventLoop: The connection is open in another event loop.
        """
        self.check_owner()
        try:
            return await self._nc.listen(subject, handler, queue=queue)
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot subscribe: {error}", url=self.address) from error

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Await `handler` with every message on `subject`, one at a time: it must be quick.

        Raises:
            BusUnavailable: The connection is gone.
            WrongEventLoop: The connection is open in another event loop.
        """
        self.check_owner()

        async def guarded(msg: Msg) -> None:
            try:
                await handler(msg)
            except Exception as error:  # noqa: BLE001 - an escaping one would end the subscription silently
                log.error("handler_failed", subject=msg.subject, **error_fields(error))

        try:
            return await self._nc.subscribe(subject, queue=queue, cb=guarded)  # type: ignore[arg-type]  # our Msg
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot subscribe: {error}", url=self.address) from error

    async def serve(self, subject: str, handler: Handler, *, queue: str = "", at_once: int = 256) -> Subscription:
        """Await `handler` with every message on `subject`, up to `at_once` of them concurrently."""
        free = asyncio.Semaphore(at_once)

        async def handle(msg: Msg) -> None:
            try:
                await handler(msg)
            except Exception as error:  # noqa: BLE001 - one bad request must not end the service
                log.error("handler_failed", subject=msg.subject, **error_fields(error))
            finally:
                free.release()

        async def accept(msg: Msg) -> None:
            await free.acquire()
            self.tasks.spawn(handle(msg), name=f"serve {msg.subject}")

        return await self.subscribe(subject, accept, queue=queue)

    def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription without waiting; safe to call twice, and when the connection is already gone."""
        self._nc.end_subscription(subscription)

    async def stop_delivery(self, subscription: Subscription) -> None:
        """Ask the server to send no more on a subscription; what is on its way still reaches the handler."""
        await self._nc._send_unsubscribe(subscription._id)  # the public call drops what is on its way

    def unsubscribe_soon(self, subscriptions: Iterable[Subscription]) -> None:
        """End subscriptions in the next turn of the connection's loop; from any thread, also from a finalizer.

        A connection that is closed, or was inherited from a parent process, has none left to end.
        """

        def end() -> None:
            for subscription in subscriptions:
                self._nc.end_subscription(subscription)

        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(end)

    # -- reconnects and errors, as nats-py reports them

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` after every reconnect; it must not block."""
        self._reconnected.append(callback)

    def forget_reconnect(self, callback: Callable[[], None]) -> None:
        """Stop calling `callback`."""
        if callback in self._reconnected:
            self._reconnected.remove(callback)

    async def reconnect(self) -> None:
        """Give up the connection and make another, if there is a server."""
        with suppress(nats.errors.Error, OSError):
            await self._nc.force_reconnect()

    async def _on_error(self, error: Exception) -> None:
        if self._closing or self._is_known_error(error):
            return
        if self._nc.is_connected:
            log.warning("bus_error", error=str(error) or type(error).__name__)
        elif self._established and any(error is failure for failure in self._connector.failures.values()):
            self._reconnect_failed(cause_of(error, tls=tls_wanted(self._addresses)))

    def _reconnect_failed(self, cause: Cause) -> None:
        """Log each cause once; give up when every server has failed for good: nats-py retries without a limit."""
        if cause.what not in self._causes_logged:
            self._causes_logged.add(cause.what)
            log.warning("reconnect_failed", server=self.address, cause=str(cause))
        self._refusals += cause.final
        if self._refusals > len(self._nc.servers) and not self.tasks.lost.is_set():
            log.error("bus_refused", server=self.address, cause=str(cause))
            self.tasks.lost.set()

    async def _on_disconnect(self) -> None:
        if self._established and not self._closing:
            log.warning("bus_disconnected")

    async def _on_reconnect(self) -> None:
        log.info("bus_reconnected")
        self._refusals = 0
        self._causes_logged.clear()
        self._reconnected_at = time.monotonic()
        harden_socket(self._nc)
        for callback in list(self._reconnected):
            try:
                callback()
            except Exception as error:  # noqa: BLE001 - an escaping one would end the reconnect half way
                log.error("reconnect_callback_failed", **error_fields(error))

    async def _on_close(self) -> None:
        if self._established and not self._closing:
            log.error("bus_closed")
            self.tasks.lost.set()

    async def _watch(self) -> None:
        """Reconnect when nats-py's read loop has died while it still believes in the connection."""
        while True:
            await asyncio.sleep(WATCH_S)
            reading = self._nc._reading_task  # the only sign of a dead read loop
            if self._nc.is_connected and reading is not None and reading.done():
                log.warning("read_loop_dead")
                await self.reconnect()


_connections: WeakSet[Connection] = WeakSet()


def _detach_all() -> None:
    for connection in list(_connections):
        connection._detach()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_detach_all)
