"""A connection to a nats-server, hardened against known faults of nats-py."""

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

import nats.errors
from nats.aio.subscription import Subscription

from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.background_tasks import BackgroundTasks, ServiceFailed
from loom.bus.natsio.loop_ownership import Owner, keep_forever, running_loop
from loom.bus.natsio.transport.addresses import Address, parse_addresses, shown, tls_required
from loom.bus.natsio.transport.connect_causes import Cause, cause_of
from loom.bus.natsio.transport.connecting import Connector, abort_client, close_client, harden_socket
from loom.bus.natsio.transport.fast_client import FastClient, SyncHandler
from loom.bus.natsio.transport.message import Msg, PayloadTooLarge, format_headers
from loom.schemas.base import encode
from loom.schemas.errors import BusUnavailable, LoomError

__all__ = ["Connection", "PayloadTooLarge", "Subscription"]

log = get_logger()

WATCH_S = 1.0
"""Seconds between two checks of nats-py's read loop."""

Handler = Callable[[Msg], Awaitable[None]]


class Connection:
    """Connects, reconnects, and publishes and subscribes at most once.

    Args:
        url: Servers, comma separated.
        name: Name of the connection in the server's list of connections.
        inbox: Prefix of the reply subjects.
        patience_s: Seconds for which `connect` tries.
        is_known_error: Called with each error that the server reports; returns whether to leave it out of the log.
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
        """The servers without credentials, for error messages and logs."""
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
        """Whether the connection was ever established."""
        self._refusals = 0
        """Final refusals in a row, since the connection was lost."""
        self._reconnected: list[Callable[[], None]] = []
        self._owner: Owner | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        """The owner's event loop, which each publish compares with the running one."""
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
        """Connect; retried for `patience_s` seconds.

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
        """Close the connection immediately, from synchronous code; unsent messages are lost."""
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
            failure = self.tasks.failure
            return ServiceFailed(f"an essential task has failed ({failure}); see the log, then start the process again")
        return BusUnavailable("the connection to the server was closed for good", url=self.address)

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection at this moment."""
        return self._nc.is_connected

    @property
    def is_closed(self) -> bool:
        """Whether the connection is closed for good."""
        return self._nc.is_closed

    @property
    def closing(self) -> bool:
        """Whether the connection is being closed on purpose, or has been."""
        return self._closing

    @property
    def is_unread(self) -> bool:
        """Whether the connection is not read any more: an event loop that ends cancels the reader."""
        reading = self._nc._reading_task
        return self._nc.is_connected and reading is not None and bool(reading.done() or reading.cancelling())

    @property
    def settled_s(self) -> float:
        """Seconds since the last reconnect; 0 while the connection is lost, infinite if it was never lost."""
        return time.monotonic() - self._reconnected_at if self._nc.is_connected else 0.0

    @property
    def server_version(self) -> tuple[int, ...]:
        """The server's version, for example (2, 15, 1)."""
        version = self._nc.connected_server_version
        return (version.major, version.minor, version.patch)

    @property
    def server_count(self) -> int:
        """Number of known servers."""
        return len(self._nc.servers)

    # -- ownership

    def check_loop(self) -> None:
        """Check as `check_owner` does, at less cost; a fork is detected only after the event loop has ended."""
        if running_loop() is not self._loop:
            self.check_owner()

    def check_owner(self) -> None:
        """Check that the connection was opened in the running event loop and in this process.

        Raises:
            WrongEventLoop: The connection was opened in another event loop.
            BusUnavailable: The connection was not opened in this process.
        """
        if self._owner is None:
            raise BusUnavailable("the connection is not open in this process; call connect() first", url=self.address)
        self._owner.check()

    def _check_free(self) -> None:
        """Check that the connection is not open in another event loop that can still run."""
        if self._owner is not None and self._owner.lives and not self._nc.is_closed:
            self._owner.check()

    def _detach(self) -> None:
        """Refuse every further call, in a forked child: sockets and selector belong to the parent process."""
        keep_forever(self.__dict__.copy())
        self._owner = self._loop = None
        self._connector.client = self._nc = FastClient()

    # -- publishing

    async def publish(
        self, subject: str, message: Any = b"", *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Publish at most once: bytes unchanged, any other message as JSON.

        Raises:
            PayloadTooLarge: Body and headers exceed the server's limit.
            BusUnavailable: The connection is closed, or its buffer is full.
        """
        self.publish_nowait(subject, message, reply=reply, headers=headers)
        if self._nc.is_congested:
            await self._nc.wait_until_writable()

    def publish_nowait(
        self, subject: str, message: Any = b"", *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Publish from code that cannot wait; for many messages use `publish`, which waits for the socket.

        Raises:
            PayloadTooLarge: Body and headers exceed the server's limit.
            BusUnavailable: The connection is closed, or its buffer is full.
            WrongEventLoop: The connection is open in another event loop.
        """
        if running_loop() is not self._loop:  # as `check_loop`, without the call: this runs for every message
            self.check_owner()
        payload = message if isinstance(message, bytes) else encode(message)
        block = format_headers(headers) if headers else b""
        if (size := len(payload) + len(block)) > self._nc.max_payload:
            raise PayloadTooLarge(f"a message of {size} bytes exceeds the server's limit of {self._nc.max_payload}")
        try:
            self._nc.send(subject, reply, payload, block)
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot publish: {error}", url=self.address) from error

    async def wait_until_writable(self) -> None:
        """Wait for the socket if much was published without waiting; else return immediately."""
        if self._nc.is_congested:
            await self._nc.wait_until_writable()

    # -- subscribing

    async def subscribe_sync(self, subject: str, handler: SyncHandler, *, queue: str = "") -> Subscription:
        """Call `handler` with every message on `subject` as soon as it is read; it must be quick.

        Raises:
            BusUnavailable: The connection is closed.
            WrongEventLoop: The connection is open in another event loop.
        """
        self.check_owner()
        try:
            return await self._nc.subscribe_sync(subject, handler, queue=queue)
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot subscribe: {error}", url=self.address) from error

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Await `handler` with every message on `subject`, one at a time; it must be quick.

        Raises:
            BusUnavailable: The connection is closed.
            WrongEventLoop: The connection is open in another event loop.
        """
        self.check_owner()

        async def guarded(msg: Msg) -> None:
            try:
                await handler(msg)
            except Exception as error:  # noqa: BLE001 - it would end the subscription silently
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
        """End a subscription without waiting; safe to call twice and on a closed connection."""
        self._nc.end_subscription(subscription)

    async def stop_delivery(self, subscription: Subscription) -> None:
        """Request the end of a subscription; messages that are on their way still reach the handler."""
        await self._nc._send_unsubscribe(subscription._id)  # the public method drops these messages

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the next iteration of the event loop; for other threads and for finalizers.

        Does nothing if the event loop is closed, or if the connection belongs to a parent process.
        """
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(callback)

    # -- reconnects and errors, as nats-py reports them

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Register a callback for every reconnect; it must not block."""
        self._reconnected.append(callback)

    def forget_reconnect(self, callback: Callable[[], None]) -> None:
        """Remove a callback; safe to call twice."""
        if callback in self._reconnected:
            self._reconnected.remove(callback)

    async def reconnect(self) -> None:
        """Close the connection and connect again, if a server is reachable."""
        with suppress(nats.errors.Error, OSError):
            await self._nc.force_reconnect()

    async def _on_error(self, error: Exception) -> None:
        if self._closing or self._is_known_error(error):
            return
        if self._nc.is_connected:
            log.warning("bus_error", error=str(error) or type(error).__name__)
        elif self._established and any(error is failure for failure in self._connector.failures.values()):
            self._reconnect_failed(cause_of(error, tls=tls_required(self._addresses)))

    def _reconnect_failed(self, cause: Cause) -> None:
        """Log each cause once, and give up when every server has refused for good: nats-py retries without limit."""
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
            except Exception as error:  # noqa: BLE001 - it would abort the reconnect
                log.error("reconnect_callback_failed", **error_fields(error))

    async def _on_close(self) -> None:
        if self._established and not self._closing:
            log.error("bus_closed")
            self.tasks.lost.set()

    async def _watch(self) -> None:
        """Reconnect when nats-py's read loop has ended although the connection counts as open."""
        while True:
            await asyncio.sleep(WATCH_S)
            reading = self._nc._reading_task  # the only indication that the read loop has ended
            if self._nc.is_connected and reading is not None and reading.done():
                log.warning("read_loop_ended")
                await self.reconnect()


_connections: WeakSet[Connection] = WeakSet()


def _detach_all() -> None:
    for connection in list(_connections):
        connection._detach()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_detach_all)
