"""Makes the first connection to one of several servers, and reports why it fails."""

import asyncio
import random
import socket
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import nats.errors
from nats.aio.client import Client

from loom.bus.logs.logger import get_logger
from loom.bus.natsio.transport.addresses import Address, tls_required
from loom.bus.natsio.transport.connect_causes import CHECK_ADDRESS, Cause, ConnectionClosedEarly, cause_of
from loom.bus.natsio.transport.fast_client import FastClient
from loom.bus.natsio.transport.resolver import Resolver
from loom.schemas.errors import BusUnavailable

log = get_logger()

RETRY_S = 0.2
"""Seconds between two attempts to connect."""
CONNECT_S = 2.0
"""Seconds for each step of an attempt to connect: name resolution, TCP, the first line, TLS."""
STALL_MS = 10_000
"""Milliseconds without an acknowledgement by TCP after which the peer is considered gone."""
REPORT_S = 10.0
"""Seconds between two log lines while no server can be reached."""


class Connector:
    """Connects a client to one of several servers, with repeated attempts.

    Args:
        addresses: The servers.
        shown: The servers without credentials, for error messages and logs.
        patience_s: Seconds for all attempts together.
        options: Further arguments of nats-py's `connect`: name, callbacks, inbox prefix.
    """

    def __init__(self, addresses: Sequence[Address], shown: str, patience_s: float, options: Mapping[str, Any]) -> None:
        self.client = FastClient()
        """The client of the last attempt."""
        self.failures: dict[str, Exception] = {}
        """Host and port -> error of the last attempt there; reconnects record their errors here, too."""
        self._addresses = addresses
        self._shown = shown
        self._patience_s = patience_s
        self._options = options
        self._resolver: Resolver | None = None

    async def connect(self) -> FastClient:
        """Return a connected client.

        Raises:
            BusUnavailable: No server could be connected to; the message contains the cause and the remedy.
        """
        self._resolver = Resolver()
        reporting = asyncio.ensure_future(self._report())
        try:
            async with asyncio.timeout(self._patience_s):
                await self._connect()
        except TimeoutError:
            await close_client(self.client)
            raise BusUnavailable(f"no nats-server at {self._shown}: {self.why()}", url=self._shown) from None
        except BusUnavailable:
            await close_client(self.client)
            raise
        finally:
            reporting.cancel()
        return self.client

    async def _report(self) -> None:
        """Log every REPORT_S why no server can be reached, because a service waits without limit."""
        while True:
            await asyncio.sleep(REPORT_S)
            log.warning("no_server_yet", server=self._shown, cause=self.why())

    def why(self) -> str:
        """Return why the connection fails; for several servers the cause of each, unless all causes are equal."""
        causes = self._causes()
        if not causes:
            return f"no answer in {self._patience_s:g} s; {CHECK_ADDRESS}"
        if len(set(causes.values())) == 1:
            return str(next(iter(causes.values())))
        return " | ".join(f"{server}: {cause}" for server, cause in causes.items())

    def _causes(self) -> dict[str, Cause]:
        tls = tls_required(self._addresses)
        return {
            address.shown: cause_of(self.failures[address.netloc], tls=tls)
            for address in self._addresses
            if address.netloc in self.failures
        }

    async def _connect(self) -> None:
        """Connect; a temporary failure is followed by another attempt, which starts with another server.

        Raises:
            BusUnavailable: No server can be connected to, and later attempts would fail, too.
        """
        order = deque(random.sample(self._addresses, len(self._addresses)))
        while True:
            with suppress(OSError, nats.errors.Error):  # kept in `failures`
                await self._connect_once(order)
                if self.client.is_connected:
                    return
                self.failures[order[0].netloc] = ConnectionClosedEarly()  # too late for nats-py to detect it
            causes = self._causes()
            if len(causes) == len({address.shown for address in self._addresses}) and all(
                cause.final for cause in causes.values()
            ):
                raise BusUnavailable(f"cannot connect to {self._shown}: {self.why()}", url=self._shown)
            await close_client(self.client)
            order.rotate(-1)
            await asyncio.sleep(RETRY_S)

    async def _connect_once(self, order: Iterable[Address]) -> None:
        self.client = FastClient(self._addresses, self._resolver, self.failures)
        await self.client.connect(
            servers=[address.url for address in order],
            dont_randomize=True,
            allow_reconnect=False,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RETRY_S,  # type: ignore[arg-type]  # a fraction works, and a server starts in 15 ms
            connect_timeout=min(CONNECT_S, self._patience_s / 2),  # type: ignore[arg-type]  # a fraction works
            ping_interval=5,
            max_outstanding_pings=2,
            drain_timeout=5,
            **self._options,
        )
        # With these options from the start, nats-py would retry the first connection without limit.
        self.client.options.update(
            allow_reconnect=True, max_reconnect_attempts=-1, reconnect_time_wait=0.5, dont_randomize=False
        )


async def close_client(client: FastClient) -> None:
    """Close a client, connected or not."""
    while (reconnecting := client._reconnection_task) is not None and not reconnecting.done():
        reconnecting.cancel()  # Python 3.11 may lose a cancellation while the connection is refused
        await asyncio.wait([reconnecting], timeout=0.1)
    if client.is_closed:
        return
    try:
        await client.close()
    except (nats.errors.Error, OSError, AssertionError, RuntimeError):
        pass  # closed nevertheless: nats-py asserts that it was connected, uvloop that it has a transport
    except asyncio.CancelledError:
        # During a reconnect nats-py cancels a future and then waits for it.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise


def abort_client(client: FastClient, tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Close a client immediately, from synchronous code, and cancel the tasks that use it."""
    client._status = Client.CLOSED  # nats-py has no synchronous close
    client._server_pool.clear()  # ends a reconnect that misses its cancellation
    writer = getattr(client._transport, "_bare_io_writer", None)
    subs = [sub._wait_for_msgs_task for sub in client._subs.values()]
    own = (client._reading_task, client._flusher_task, client._ping_interval_task, client._reconnection_task)
    running = [*tasks, *(task for task in (*own, *subs) if task is not None and not task.done())]
    if any(task.get_loop().is_closed() for task in running) or not running:
        _close_socket(writer)  # its event loop, which would have closed it, has ended
        return
    for task in running:
        task.cancel()
    if writer is not None:
        writer.close()


def harden_socket(client: FastClient) -> None:
    """Make the operating system close a connection whose peer acknowledges nothing for STALL_MS."""
    writer = getattr(client._transport, "_bare_io_writer", None)  # nats-py offers no socket options
    sock = writer.get_extra_info("socket") if writer else None
    if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_MS)


def _close_socket(writer: asyncio.StreamWriter | None) -> None:
    """Close the socket of a transport whose event loop is closed."""
    transport = writer.transport if writer is not None else None
    sock = getattr(transport, "_sock", None)
    if sock is not None:
        sock.close()
        transport._sock, transport._closing = None, True  # type: ignore[union-attr]  # avoids its ResourceWarning
