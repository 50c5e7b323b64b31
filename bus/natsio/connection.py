"""The connection: hardened against what was seen to break nats-py, and the only place that makes one."""

import asyncio
import math
import os
import random
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self
from uuid import uuid4
from weakref import WeakSet

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.subscription import Subscription

from loom.bus.hops.isolation import Gate
from loom.bus.logs.discards import Discards
from loom.bus.logs.log_fields import describe, summary
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.clock import ServerClock
from loom.bus.natsio.ownership import Owner, keep_forever, running_loop
from loom.bus.natsio.transport.addresses import Address, parse_addresses, shown, tls_wanted
from loom.bus.natsio.transport.connect_causes import CHECK_ADDRESS, Cause, HungUp, cause_of
from loom.bus.natsio.transport.fast_client import LeanClient, Take
from loom.bus.natsio.transport.message import Msg, format_headers
from loom.bus.natsio.transport.resolver import Resolver
from loom.bus.subjects import Subjects
from loom.schemas.base import encode
from loom.schemas.errors import BusUnavailable, LoomError
from loom.schemas.identity import LOCAL, PUBLIC, Identity

log = get_logger()

STALL_MS = 10_000  # unacknowledged bytes for this long mean a half-open peer
RETRY_S = 0.2
CONNECT_S = 2.0
"""How long each step of one attempt to connect may take: look-up, TCP, the first line, TLS."""
TELL_S = 10.0
"""How often it is said that there is no server to connect to."""
END_S = 5.0
WATCH_S = 1.0

Handler = Callable[[Msg], Awaitable[None]]


class PayloadTooLarge(LoomError):
    """A message over the server's limit, refused here because the server would cut the connection for good."""

    code = "invalid_task"


class ServiceFailed(LoomError):
    """A task without which the process is of no use has ended with an exception."""

    code = "service_failed"


class Connection:
    """One connection to one namespace on a nats-server: plain messages, and the life of the connection itself.

    Args:
        url: Servers, comma separated.
        namespace: First token of every subject.
        role: Names the connection and its inboxes: `_INBOX.<random>` for `client`, `_LOOM.<role>.<instance>.<random>`
            for phases, hosts (`node`) and commands of operators (`operator`), so that permissions can keep them apart.
        identity: The submitter, owner and source it speaks as.
        patience_s: How long `connect` tries.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "loom",
        role: str = "client",
        identity: Identity = LOCAL,
        patience_s: float = 2.0,
    ) -> None:
        self.url = url
        self._addresses: tuple[Address, ...] = ()
        self.address = "the servers of NATS_URL"
        """The servers without credentials, for messages and logs."""
        with suppress(BusUnavailable):  # raised by `connect`
            self._addresses = parse_addresses(url)
            self.address = shown(self._addresses)
        self._failures: dict[str, Exception] = {}
        """host and port -> why the last attempt there failed"""
        self._causes_logged: set[str] = set()
        self._patience_s = patience_s
        self.subjects = Subjects(namespace)
        self.role = role
        self.identity = identity
        self.instance = f"{role}-{uuid4().hex[:8]}"
        self.lost = asyncio.Event()
        """Set when the connection is closed for good or an essential task has failed: the process should end."""
        self.failure = ""
        """The essential task that failed first, and its error."""
        self.gate = Gate()
        self.discards = Discards()
        self.clock = ServerClock()
        self._reconnected_at = -math.inf
        self._nc = LeanClient()
        own = "_INBOX" if role == "client" else f"_LOOM.{role}.{self.instance}"
        self._inbox = f"{own}.{uuid4().hex[:22]}"
        self._closing = False
        self._established = False
        """Whether there has been a connection."""
        self._refusals = 0
        """In a row, since the connection was lost."""
        self._reconnected: list[Callable[[], None]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._essential: set[asyncio.Task[Any]] = set()
        self._owner: Owner | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        """Its owner's, compared with the running one at each message."""
        _connections.add(self)

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
        self._resolver = Resolver()
        telling = asyncio.ensure_future(self._tell())
        try:
            async with asyncio.timeout(self._patience_s):
                await self._connect_first()
        except TimeoutError:
            await self._discard()
            raise BusUnavailable(f"no nats-server at {self.address}: {self._why()}", url=self.address) from None
        except BusUnavailable:
            await self._discard()
            raise
        finally:
            telling.cancel()
        self._established = True
        self._harden_socket()
        self.spawn(self._watch(), name="bus-watch", essential=True)
        return self

    async def _tell(self) -> None:
        """Log every TELL_S why there is no server yet: a service waits without a limit."""
        while True:
            await asyncio.sleep(TELL_S)
            log.warning("no_server_yet", server=self.address, cause=self._why())

    def _why(self) -> str:
        """Return why no server could be connected to; of several, each one's own cause unless they are alike."""
        causes = self._causes()
        if not causes:
            return f"no answer in {self._patience_s:g} s; {CHECK_ADDRESS}"
        if len(set(causes.values())) == 1:
            return str(next(iter(causes.values())))
        return " | ".join(f"{server}: {cause}" for server, cause in causes.items())

    def _causes(self) -> dict[str, Cause]:
        tls = tls_wanted(self._addresses)
        return {
            address.shown: cause_of(self._failures[address.netloc], tls=tls)
            for address in self._addresses
            if address.netloc in self._failures
        }

    async def _connect_first(self) -> None:
        """Connect; what may heal is tried again, beginning with another server each time.

        Raises:
            BusUnavailable: No server can be connected to, and waiting does not help.
        """
        order = deque(random.sample(self._addresses, len(self._addresses)))
        while True:
            with suppress(OSError, nats.errors.Error):  # kept in _failures
                await self._connect_once(order)
                if self._nc.is_connected:
                    return
                self._failures[order[0].netloc] = HungUp()  # so late that nats-py has not noticed
            causes = self._causes()
            if len(causes) == len({address.shown for address in self._addresses}) and all(
                cause.final for cause in causes.values()
            ):
                raise BusUnavailable(f"cannot connect to {self.address}: {self._why()}", url=self.address)
            await self._discard()
            order.rotate(-1)
            await asyncio.sleep(RETRY_S)

    async def _connect_once(self, order: Iterable[Address]) -> None:
        self._nc = LeanClient(self._addresses, self._resolver, self._failures)
        await self._nc.connect(
            servers=[address.url for address in order],
            dont_randomize=True,
            name=f"loom {self.instance}",
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnect,
            reconnected_cb=self._on_reconnect,
            closed_cb=self._on_close,
            allow_reconnect=False,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RETRY_S,  # type: ignore[arg-type]  # a fraction works, and a server starts in 15 ms
            connect_timeout=min(CONNECT_S, self._patience_s / 2),  # type: ignore[arg-type]  # a fraction works
            inbox_prefix=self._inbox,
            ping_interval=5,
            max_outstanding_pings=2,
            drain_timeout=5,
        )
        # nats-py tries the first connection for ever by itself; what it does after that must be asked for.
        self._nc.options.update(
            allow_reconnect=True, max_reconnect_attempts=-1, reconnect_time_wait=0.5, dont_randomize=False
        )

    async def _discard(self) -> None:
        self._closing = True
        await self._close_connection()
        self._closing = False

    async def close(self) -> None:
        """Close the connection; safe to call twice or before `connect`.

        Raises:
            WrongEventLoop: The connection is open in another event loop.
        """
        self._check_free()
        self._closing = True
        await self._end_tasks()
        await self._close_connection()

    async def _close_connection(self) -> None:
        while (reconnecting := self._nc._reconnection_task) is not None and not reconnecting.done():
            reconnecting.cancel()  # once may not do: Python 3.11 loses it when the connection is refused just then
            await asyncio.wait([reconnecting], timeout=0.1)
        if not self._nc.is_closed:
            try:
                await self._nc.close()
            except (nats.errors.Error, OSError, AssertionError, RuntimeError):
                pass  # closed all the same; it asserts that it ever connected, uvloop that its transport is there
            except asyncio.CancelledError:
                # Amid a reconnect nats-py cancels a future and then waits for it.
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise

    def abort(self) -> None:
        """Drop the connection at once, from synchronous code; what is unsent is lost."""
        self._closing = True
        nc = self._nc
        nc._status = Client.CLOSED  # nats-py has no synchronous close
        nc._server_pool.clear()  # ends a reconnect that misses its cancellation
        writer = getattr(nc._transport, "_bare_io_writer", None)
        subs = [sub._wait_for_msgs_task for sub in nc._subs.values()]
        own = (nc._reading_task, nc._flusher_task, nc._ping_interval_task, nc._reconnection_task)
        running = [task for task in (*self._tasks, *own, *subs) if task is not None and not task.done()]
        if any(task.get_loop().is_closed() for task in running) or not running:
            _close_socket(writer)  # the loop that would have closed it has gone, and its tasks with it
            return
        for task in running:
            task.cancel()
        if writer is not None:
            writer.close()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def spawn(self, work: Any, *, name: str, essential: bool = False) -> asyncio.Task[Any]:
        """Run a coroutine beside the connection; it is cancelled when the connection closes.

        Args:
            essential: Whether the process is of no use without it: an exception that ends it sets `lost`.
        """
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        if essential:
            self._essential.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        essential = task in self._essential
        self._essential.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        log.error("essential_task_failed" if essential else "bus_task_failed", task=task.get_name(), **describe(error))
        if essential and not self._closing:
            self.failure = self.failure or f"{task.get_name()}: {summary(error)}"
            self.lost.set()

    def loss(self) -> LoomError:
        """Return why `lost` is set: an essential task has failed, or the connection was closed for good."""
        if self.failure:
            return ServiceFailed(f"an essential task has failed ({self.failure}); see the log, then start it again")
        return BusUnavailable("the connection to the server was closed for good", url=self.address)

    async def _end_tasks(self) -> None:
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            _, deaf = await asyncio.wait(tasks, timeout=END_S)  # an agent's code may be deaf to it
            for task in deaf:
                log.warning("task_left_behind", task=task.get_name())

    @property
    def by_name(self) -> bool:
        """Whether this is a client whose requests name their submitter; others use the plain subjects."""
        return self.role == "client" and self.identity.submitter != PUBLIC

    @property
    def closing(self) -> bool:
        """Whether the connection is being closed, or has been, on purpose."""
        return self._closing

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

    # -- ownership

    def check_owner(self) -> None:
        """Return if the connection was opened in the running event loop.

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

    def _forget(self) -> None:
        """Become a connection that was never opened, in a forked child: sockets and selector are the parent's."""
        keep_forever(self.__dict__.copy())
        self.__init__(  # type: ignore[misc]  # subclasses take the same arguments
            self.url,
            namespace=self.subjects.namespace,
            role=self.role,
            identity=self.identity,
            patience_s=self._patience_s,
        )

    # -- time

    def now(self) -> float:
        """Return the server's time, seconds since the epoch."""
        return self.clock.now()

    # -- plain messages

    async def publish(
        self, subject: str, message: Any = b"", *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Publish at most once; bytes go as they are, anything else as JSON.

        Raises:
            PayloadTooLarge: Body and headers are over the server's limit.
            BusUnavailable: The connection is gone, or its buffer is full.
        """
        self.send(subject, message, reply=reply, headers=headers)
        if self._nc.clogged:
            await self._nc.unclog()

    def send(
        self, subject: str, message: Any = b"", *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Publish from where nobody can wait: whoever sends much must use `publish`, which waits for a full socket.

        Raises:
            PayloadTooLarge: Body and headers are over the server's limit.
            BusUnavailable: The connection is gone, or its buffer is full.
            WrongEventLoop: The connection is open in another event loop.
        """
        if running_loop() is not self._loop:
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

    async def listen(self, subject: str, take: Take, *, queue: str = "") -> Subscription:
        """Hand every message on `subject` to `take` the moment it is read: it must be quick, and cannot wait.

        Raises:
            BusUnavailable: The connection is gone.
            WrongEventLoop: The connection is open in another event loop.
        """
        self.check_owner()
        try:
            return await self._nc.listen(subject, take, queue=queue)
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot subscribe: {error}", url=self.address) from error

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Hand every message on `subject` to `handler`, one at a time: it must be quick.

        Raises:
            BusUnavailable: The connection is gone.
            WrongEventLoop: The connection is open in another event loop.
        """
        self.check_owner()

        async def guarded(msg: Msg) -> None:
            try:
                await handler(msg)
            except Exception as error:  # noqa: BLE001 - an escaping one would end the subscription silently
                log.error("handler_failed", subject=msg.subject, **describe(error))

        try:
            return await self._nc.subscribe(subject, queue=queue, cb=guarded)  # type: ignore[arg-type]  # our Msg
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot subscribe: {error}", url=self.address) from error

    async def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription; safe when the connection is already gone."""
        self.end_subscription(subscription)

    def end_subscription(self, subscription: Subscription) -> None:
        """End a subscription without waiting; safe to call twice, and when the connection is already gone."""
        self._nc.end_subscription(subscription)

    def end_soon(self, subscriptions: Iterable[Subscription]) -> None:
        """End subscriptions in the next turn of the connection's loop; from any thread, also from a finalizer.

        A connection that is closed, or was inherited from a parent process, has none left to end.
        """

        def end() -> None:
            for subscription in subscriptions:
                self._nc.end_subscription(subscription)

        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(end)

    async def serve(self, subject: str, handler: Handler, *, queue: str = "", at_once: int = 256) -> Subscription:
        """Hand every message on `subject` to `handler`, up to `at_once` of them side by side."""
        room = asyncio.Semaphore(at_once)

        async def work(msg: Msg) -> None:
            try:
                await handler(msg)
            except Exception as error:  # noqa: BLE001 - one bad request must not end the service
                log.error("handler_failed", subject=msg.subject, **describe(error))
            finally:
                room.release()

        async def accept(msg: Msg) -> None:
            await room.acquire()
            self.spawn(work(msg), name=f"serve {msg.subject}")

        return await self.subscribe(subject, accept, queue=queue)

    # -- what nats-py tells us

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` after every reconnect; it must not block."""
        self._reconnected.append(callback)

    def forget_reconnect(self, callback: Callable[[], None]) -> None:
        """Stop calling `callback`."""
        if callback in self._reconnected:
            self._reconnected.remove(callback)

    async def _on_error(self, error: Exception) -> None:
        if self._closing:
            return
        if self._nc.is_connected:
            log.warning("bus_error", error=str(error) or type(error).__name__)
        elif self._established and any(error is failure for failure in self._failures.values()):
            self._reconnect_failed(cause_of(error, tls=tls_wanted(self._addresses)))

    def _reconnect_failed(self, cause: Cause) -> None:
        """Log each cause once; give up when every server has failed for good: nats-py retries without a limit."""
        if cause.what not in self._causes_logged:
            self._causes_logged.add(cause.what)
            log.warning("reconnect_failed", server=self.address, cause=str(cause))
        self._refusals += cause.final
        if self._refusals > len(self._nc.servers) and not self.lost.is_set():
            log.error("bus_refused", server=self.address, cause=str(cause))
            self.lost.set()

    async def _on_disconnect(self) -> None:
        if not self._closing:
            log.warning("bus_disconnected")

    async def _on_reconnect(self) -> None:
        log.info("bus_reconnected")
        self._refusals = 0
        self._causes_logged.clear()
        self._reconnected_at = time.monotonic()
        self._harden_socket()
        for callback in list(self._reconnected):
            try:
                callback()
            except Exception as error:  # noqa: BLE001 - an escaping one would end the reconnect half way
                log.error("reconnect_callback_failed", **describe(error))

    async def _on_close(self) -> None:
        if not self._closing:
            log.error("bus_closed")
            self.lost.set()

    def _harden_socket(self) -> None:
        transport = self._nc._transport  # nats-py offers no socket options
        writer = getattr(transport, "_bare_io_writer", None)
        sock = writer.get_extra_info("socket") if writer else None
        if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_MS)

    async def _watch(self) -> None:
        """Reconnect when nats-py's read loop has died while it still believes in the connection."""
        while True:
            await asyncio.sleep(WATCH_S)
            reading = self._nc._reading_task  # the only sign of a dead read loop
            if self._nc.is_connected and reading is not None and reading.done():
                log.warning("read_loop_dead")
                await self._reconnect()

    async def _reconnect(self) -> None:
        with suppress(nats.errors.Error, OSError):
            await self._nc.force_reconnect()


_connections: WeakSet[Connection] = WeakSet()


def _forget_all() -> None:
    for connection in list(_connections):
        connection._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _close_socket(writer: asyncio.StreamWriter | None) -> None:
    """Close the socket of a transport whose event loop is closed and cannot do it any more."""
    transport = writer.transport if writer is not None else None
    sock = getattr(transport, "_sock", None)
    if sock is not None:
        sock.close()
        transport._sock, transport._closing = None, True  # type: ignore[union-attr]  # so that its end warns of nothing
