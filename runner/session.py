"""Everything one Python process needs to use loom, opened together and closed together."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from contextvars import Context, copy_context
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet

from loom.agents.host.autoscaler import Skills
from loom.agents.host.node_host import NodeHost
from loom.agents.host.slots import Node
from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.logs import logger
from loom.bus.logs.log_fields import error_fields
from loom.bus.natsio.loop_ownership import Owner, keep_forever, running_loop
from loom.bus.natsio.requests import NoResponders
from loom.bus.service_discovery import check_processes
from loom.bus.topology import check_version
from loom.bus.wire_version import WireMismatch
from loom.runner import log_output
from loom.runner.server.nats_server import NatsServer, embedded_server
from loom.runner.server.store import log_store, log_unused_store
from loom.runner.services import build_host, phases_on
from loom.runner.settings import Settings, warn_of_misspelt_settings
from loom.schemas.base import Undecodable, new_id
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import BusUnavailable, LoomError, UnknownTask
from loom.schemas.identity import node_key, split_qualified
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.llm import AnyProvider

STREAMS_S = 10.0
"""How long phases that answer may be without their streams: they create them again within seconds."""
ASK_AGAIN_S = 0.25
NODES_S = 0.1
"""How often a session without nodes looks for some."""
HOST_AGAIN_S = 1.0
"""Pause after nodes could not be hosted."""
ABORT_S = 5.0
"""How long another thread waits for a session's loop to drop its connections."""


class Inheritance(NamedTuple):
    """What a forked child knows of the session that goes on in its parent process."""

    url: str
    """Address of the parent's embedded server; empty when it uses the server of NATS_URL."""
    nodes: tuple[Node, ...]
    """The nodes that the parent hosts."""


class Session:
    """A client's bus and a host for its nodes, if any; without a server to use, also a server and the six phases.

    Args:
        nodes: Returns the nodes to host, read live.
        settings: Its `nats_url` decides: given, that server and the phases on it are used; empty, embedded ones.
        config: Rules the phases started here; others have their own.
        llm: Model of the phases SENSE, SCALE and EVALUATE that are started here.
        skills: Makes nodes of skills; given, nodes are started here on request, up to `config.max_nodes` in all.
        context: What runs and phases see of context variables; absent: the caller's. Each run has a copy of its own.
        parent: The session of the parent process, after a fork: its embedded server is used while its phases answer,
            and its nodes stay there.
        owner: The event loop it works in; absent: the running one.
        store: Where an embedded server keeps its streams; absent: the folder of LOOM_STORE, else a temporary one.
    """

    def __init__(
        self,
        nodes: Callable[[], Sequence[Node]],
        settings: Settings,
        config: ClusterConfig | None = None,
        llm: AnyProvider | None = None,
        skills: Skills | None = None,
        context: Context | None = None,
        parent: Inheritance | None = None,
        owner: Owner | None = None,
        store: Path | None = None,
    ) -> None:
        self._nodes = nodes
        self._settings = settings
        self._config = config or settings.cluster
        self._llm = llm
        self._skills = skills
        self._stack = AsyncExitStack()
        self._buses: list[Bus] = []
        self._server: NatsServer | None = None
        self._url = ""
        self._asked_store = store
        self._store = store or (Path(settings.loom_store) if settings.loom_store else None)
        self._parent = parent
        self._aborted = False
        self.owner = owner or Owner("session")
        self.opening = asyncio.Lock()
        """For those who share the session: held while it is opened or closed."""
        self.users = 0
        """For those who share the session: how many of them use it."""
        self.is_open = False
        self.inheritance: Inheritance | None = None
        """Set in a forked child, if the session was at work in the parent."""
        self._context = copy_context() if context is None else context
        self.bus: Bus
        """The client's connection."""
        self._host: NodeHost | None = None
        """Absent while there are no nodes."""
        self._hosting = asyncio.Lock()
        """Held while the host is opened."""
        self._waiting_for_nodes: asyncio.Task[None] | None = None
        _sessions.add(self)

    async def open(self) -> None:
        """Open all of it, or nothing.

        Raises:
            BusUnavailable: No server, or a server without phases.
            WireMismatch: The store or the running phases are of another wire version.
        """
        # In a task with a context of its own: the first caller's variables must not reach what is started here.
        await self.owner.loop.create_task(self._open(), context=self._context.copy())
        if self._aborted:
            await self.aclose()
            raise BusUnavailable("the session was closed while it was being opened")
        self.is_open = True

    async def _open(self) -> None:
        if self._settings.loom_log_level and logger.is_default():
            log_output.configure(self._settings.loom_log_level)
        warn_of_misspelt_settings()
        try:
            self._url = self._settings.nats_url or await self._parents_server() or await self._embedded()
            self.bus = await self._connect(self._url, "client")
            if self._server is None:
                await check_phases(self.bus)
                if not self.bus.by_name:
                    await check_processes(self.bus)
                if self._asked_store is not None:
                    log_unused_store(self._asked_store, self.bus.connection.address)
            await self._host_nodes()
            if self._host is None:
                self._waiting_for_nodes = self.bus.tasks.spawn(self._host_later(), name="wait for nodes")
        except BaseException:
            await self.aclose()
            raise

    async def _host_nodes(self) -> None:
        """Host the nodes, unless that is done or there are none: a client without nodes needs no rights of a host."""
        async with self._hosting:
            if self._host is None and (self._server or self._skills or self._hosted()):
                host = self._open_host()
                # In a context of its own, as `open`: the caller's variables must not reach the runs.
                await self.owner.loop.create_task(host, context=self._context.copy())

    async def _host_later(self) -> None:
        """Host nodes once there are some; a failure is logged, and the next try follows a pause."""
        while self._host is None:
            await asyncio.sleep(NODES_S)
            try:
                await self._host_nodes()
            except (LoomError, TimeoutError) as error:
                logger.get_logger().warning("nodes_not_hosted", **error_fields(error))
                await asyncio.sleep(HOST_AGAIN_S)

    async def _open_host(self) -> None:
        host_bus = await self._connect(self._url, "node")
        if self.bus.by_name:
            await check_processes(host_bus)
        max_nodes = None if self._skills is None else self._config.max_nodes
        host = build_host(host_bus, self._hosted, max_nodes=max_nodes, skills=self._skills)
        self._stack.push_async_callback(host.drain, self._config.drain_timeout_s)
        await host.start()
        self._host = host
        if self._server is not None and self._store is not None:
            await self._recall(self._hosted())

    @property
    def hosts_nodes(self) -> bool:
        """Whether nodes are hosted here, or may be."""
        return self._host is not None

    async def _recall(self, nodes: Sequence[Node]) -> None:
        """Show each node what the store holds about it."""
        profiles, owner = self.bus.bucket("nodes", NodeProfile), self.bus.identity.owner

        async def recall(node: Node) -> None:
            with suppress(Undecodable):  # ADAPT reports it and writes it again
                if entry := await profiles.get(node_key(owner, node.id)):
                    node.mirror(entry.value)

        await asyncio.gather(*map(recall, nodes))

    async def announce(self, node: str | None) -> None:
        """Host nodes that are new here, and announce `node`, qualified by its owner, if it is one of them."""
        if self._host is None:
            await self._host_nodes()
        host = self._host
        owner, node_id = split_qualified(node or "")
        if host is not None and node_id and owner == self.bus.identity.owner and host.is_new(node_id):
            await host.announce()
            await host.bus.requests.flush()  # the server has it before the task

    async def aclose(self) -> None:
        """Drain and close, in the reverse order of opening; safe to call twice. In a forked child, do nothing."""
        if self.owner.inherited:
            return
        self.is_open = False
        if self._waiting_for_nodes is not None:
            self._waiting_for_nodes.cancel()
            await asyncio.wait([self._waiting_for_nodes])
        await self._stack.aclose()
        self._buses.clear()

    def check(self) -> None:
        """Return while all that was started here works.

        Raises:
            ServiceFailed: An essential task of it has failed.
        """
        for bus in self._buses:
            if bus.tasks.failure:
                raise bus.connection.loss()

    def abort(self) -> None:
        """Drop everything at once, from synchronous code in any thread; in a forked child, do nothing."""
        if self.owner.inherited:
            return
        self._aborted = True
        loop = self.owner.loop
        if loop.is_running() and running_loop() is not loop:
            dropped = threading.Event()

            def drop() -> None:
                self._drop()
                dropped.set()

            with suppress(RuntimeError):  # the loop has just been closed
                loop.call_soon_threadsafe(drop)
                dropped.wait(ABORT_S)
        else:
            self._drop()
        if self._server is not None:
            self._server.stop()

    def _drop(self) -> None:
        if not self.is_open:
            return  # `open` finds that it was aborted
        self.is_open = False
        self._stack.pop_all()
        if self._host is not None:
            self._host.abort()
        for bus in self._buses:
            bus.abort()
        self._buses.clear()

    def leave_to_parent(self) -> None:
        """Keep what a forked child may know of the session, and never destroy the rest."""
        if self.is_open and self.owner.loop.is_running():
            self.inheritance = Inheritance(self._url if self._server else "", tuple(self._nodes()))
        keep_forever(self)

    def _hosted(self) -> Sequence[Node]:
        """Return the nodes to host here: all but those that the parent process hosts."""
        nodes = self._nodes()
        if self._parent is None:
            return nodes
        elsewhere = {id(node) for node in self._parent.nodes}
        return [node for node in nodes if id(node) not in elsewhere]

    async def _parents_server(self) -> str:
        """Return the address of the parent's server; empty when there is none, or its phases do not answer."""
        if self._parent is None or not self._parent.url:
            return ""
        try:
            async with Bus(
                self._parent.url, namespace=self._settings.loom_namespace, identity=self._settings.identity
            ) as bus:
                await check_phases(bus)
        except BusUnavailable:
            self._parent = None  # the parent has ended: its nodes are hosted here, too
            return ""
        return self._parent.url

    async def _embedded(self) -> str:
        settings = self._settings
        server = embedded_server(
            self._store, token=settings.loom_token, sync_interval=settings.loom_sync_interval or None
        )
        self._server = await self._stack.enter_async_context(server)
        log_store(self._store)
        bus = await self._connect(self._server.url, "phases")
        phases = phases_on(bus, config=self._config, llm=self._llm, hosts_here=True)
        try:
            await self._stack.enter_async_context(phases)
        except WireMismatch as error:
            raise error.in_store(self._store) from None
        return self._server.url

    async def _connect(self, url: str, role: str) -> Bus:
        bus = Bus(url, namespace=self._settings.loom_namespace, identity=self._settings.identity, role=role)
        self._buses.append(bus)
        return await self._stack.enter_async_context(bus)


_sessions: WeakSet[Session] = WeakSet()


def _leave_all() -> None:
    for session in list(_sessions):
        session.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all)


async def check_phases(bus: Bus) -> None:
    """Return once a phase has answered; one that cannot read its streams yet is asked again for 10 s.

    Raises:
        BusUnavailable: None does, the server is too old for any, or the streams stay away.
    """
    check_version(bus)
    give_up = time.monotonic() + STREAMS_S
    while True:
        try:
            await task_client.status(bus, f"probe-{new_id()[:8]}")
        except UnknownTask:
            return
        except BusUnavailable as error:
            no_reply = isinstance(error.__cause__, TimeoutError | NoResponders)
            if no_reply or time.monotonic() >= give_up:
                raise
        await asyncio.sleep(ASK_AGAIN_S)
