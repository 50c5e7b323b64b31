"""The bus of one process: its connection to a namespace, and the parts that every client of the namespace needs."""

import contextlib
import os
from types import TracebackType
from typing import Self, TypeVar
from uuid import uuid4
from weakref import WeakSet

from loom.bus.hops.isolation import SharedExclusiveLock
from loom.bus.logs.discards import Discards
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.clock import ServerClock
from loom.bus.natsio.clock_sync import ClockSync
from loom.bus.natsio.connection import Connection
from loom.bus.natsio.jetstream import JetStream
from loom.bus.natsio.kv import Bucket
from loom.bus.natsio.loop_ownership import keep_forever
from loom.bus.natsio.requests import Requests
from loom.bus.result_subscriptions import ResultSubscriptions
from loom.bus.subjects import Subjects
from loom.schemas.identity import LOCAL, PUBLIC, Identity

log = get_logger()
T = TypeVar("T")

CLOCK_S = 1.0
"""Seconds to wait for the server's time."""
_DISCOVERY_DENIED = 'permissions violation for publish to "$srv.'


class Bus:
    """The access of one process to a namespace on a nats-server.

    `connection` publishes and subscribes, `requests` waits for replies, `jetstream` publishes into streams, `results`
    receives the results of tasks. `tasks` runs coroutines until the connection closes, `subjects` builds subjects,
    `clock` returns the server's time.

    Args:
        url: Servers, comma separated.
        namespace: First token of every subject.
        role: `client`, a phase, `node` for hosts, or `operator`. It is part of the connection's name and inboxes, so
            that permissions can distinguish them. Inboxes are `_INBOX.<random>` for clients, and
            `_LOOM.<role>.<instance>.<random>` for the others.
        identity: Submitter, owner and source of what is published.
        patience_s: Seconds for which `connect` tries.
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
        self.subjects = Subjects(namespace)
        self.role = role
        self.identity = identity
        self.instance = f"{role}-{uuid4().hex[:8]}"
        self._patience_s = patience_s
        own = "_INBOX" if role == "client" else f"_LOOM.{role}.{self.instance}"
        self.connection = Connection(
            url,
            name=f"loom {self.instance}",
            inbox=f"{own}.{uuid4().hex[:22]}",
            patience_s=patience_s,
            is_known_error=self._is_known_error,
        )
        self.tasks = self.connection.tasks
        self.isolation = SharedExclusiveLock()
        """Runs suspected poison messages of this process one at a time."""
        self.discards = Discards()
        self.clock = ServerClock()
        self.requests = Requests(self.connection)
        self.jetstream = JetStream(self.connection, self.requests, self.discards)
        self.results = ResultSubscriptions(self.requests, self.subjects)
        self._clock_sync = ClockSync(self.clock, self.requests, self.connection, self.subjects.stream("TASKS"))
        _buses.add(self)

    async def connect(self) -> Self:
        """Connect; retried for `patience_s` seconds.

        Raises:
            BusUnavailable: No server could be connected to; the message contains the cause and the remedy.
            WrongEventLoop: The connection is open in another event loop.
        """
        self.results.reset()
        await self.connection.connect()
        await self.requests.start()
        await self.jetstream.start()
        if not self.by_name:  # a submitter has no permission to read information of streams
            await self.sync_clock()
            self.tasks.spawn(self._clock_sync.keep(), name="clock", essential=True)
        return self

    async def sync_clock(self) -> bool:
        """Set `clock` by the server's time, and return whether the server answered.

        The server's time is part of the information of a stream. `clock` keeps this machine's time without JetStream,
        without the namespace's streams, and without the permission to request their information.
        """
        return await self._clock_sync.sync(timeout_s=CLOCK_S)

    async def close(self) -> None:
        """Close the connection; safe to call twice or before `connect`. Publishes without an acknowledgement fail."""
        await self.connection.close()
        self.jetstream.close()

    def abort(self) -> None:
        """Close the connection immediately, from synchronous code; unsent messages are lost."""
        self.connection.abort()
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the waiting tasks ended with it
            self.jetstream.close()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def bucket(self, name: str, shape: type[T]) -> Bucket[T]:
        """Return a key-value bucket of the namespace.

        Args:
            name: Name in the topology: `records`, `plans`, `nodes` or `tuning`.
            shape: Type of the values.
        """
        return Bucket(self.jetstream, self.subjects.bucket(name), shape)

    @property
    def by_name(self) -> bool:
        """Whether this is a client with a submitter in the subjects of its requests; others use the plain subjects."""
        return self.role == "client" and self.identity.submitter != PUBLIC

    def _is_known_error(self, error: Exception) -> bool:
        if self.role == "client" and _DISCOVERY_DENIED in str(error).lower():
            log.info("discovery_denied", hint="processes of another wire version cannot be detected")
            return True
        return self._clock_sync.is_denial(error)

    def _detach(self) -> None:
        """Become an unconnected bus, in a forked child: sockets and selector belong to the parent process."""
        keep_forever(self.__dict__.copy())
        self.__init__(  # type: ignore[misc]  # no subclass takes other arguments
            self.connection.url,
            namespace=self.subjects.namespace,
            role=self.role,
            identity=self.identity,
            patience_s=self._patience_s,
        )


_buses: WeakSet[Bus] = WeakSet()


def _detach_all() -> None:
    for bus in list(_buses):
        bus._detach()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_detach_all)
