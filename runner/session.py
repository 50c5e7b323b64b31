"""Everything one Python process needs to use loom, opened together and closed together."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from contextvars import Context, copy_context

from loom.agents.host import NodeHost
from loom.agents.node import Node
from loom.agents.nursery import Nursery, Skills
from loom.bus import log, tasks
from loom.bus.client import Bus, NoResponders
from loom.bus.topology import check_version
from loom.runner import logs
from loom.runner.cluster import PhaseGroup
from loom.runner.embedded import NatsServer, embedded_server
from loom.runner.settings import Settings, warn_of_misspelt_settings
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import BusUnavailable, UnknownTask
from loom.schemas.llm import LLMProvider
from loom.schemas.wire import new_id

STREAMS_S = 10.0
"""How long phases that answer may be without their streams: they create them again within seconds."""
ASK_AGAIN_S = 0.25


class Session:
    """A client's bus and a host for its nodes; without a server to use, also a server and the six phases.

    Args:
        nodes: Returns the nodes to host, read live.
        settings: Its `nats_url` decides: given, that server and the phases on it are used; empty, embedded ones.
        config: Rules the phases started here; others have their own.
        llm: What SENSE may ask, where it is started here.
        skills: Makes nodes of skills; given, nodes are started here on request, up to `config.max_nodes` in all.
        context: What runs and phases see of context variables; absent: the caller's. Each run has a copy of its own.
    """

    def __init__(
        self,
        nodes: Callable[[], Sequence[Node]],
        settings: Settings,
        config: ClusterConfig | None = None,
        llm: LLMProvider | None = None,
        skills: Skills | None = None,
        context: Context | None = None,
    ) -> None:
        self._nodes = nodes
        self._settings = settings
        self._config = config or settings.cluster
        self._llm = llm
        self._skills = skills
        self._stack = AsyncExitStack()
        self._buses: list[Bus] = []
        self._server: NatsServer | None = None
        self.loop = asyncio.get_running_loop()
        self._context = copy_context() if context is None else context
        self.bus: Bus
        """The client's connection."""
        self._host: NodeHost | None = None

    async def open(self) -> None:
        """Open all of it, or nothing.

        Raises:
            BusUnavailable: No server, or a server without phases.
        """
        # In a task with a context of its own: all that is started here goes on in it, whoever was first to open this.
        await self.loop.create_task(self._open(), context=self._context.copy())

    async def _open(self) -> None:
        if self._settings.loom_log_level and log.is_default():
            logs.configure(self._settings.loom_log_level)
        warn_of_misspelt_settings()
        try:
            url = self._settings.nats_url or await self._embedded()
            self.bus = await self._connect(url, "client")
            if self._settings.nats_url:
                await check_phases(self.bus)
            host_bus = await self._connect(url, "node")
            nursery = Nursery(host_bus, self._nodes, max_nodes=self._config.max_nodes, skills=self._skills)
            self._host = NodeHost(host_bus, nursery.nodes)
            self._stack.push_async_callback(self._host.drain, self._config.drain_timeout_s)
            await self._host.start()
            if self._skills is not None:
                self._stack.push_async_callback(nursery.stop)
                await nursery.start(self._host)
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Drain and close, in the reverse order of opening; safe to call twice."""
        await self._stack.aclose()
        self._buses.clear()

    def check(self) -> None:
        """Return while all that was started here works.

        Raises:
            ServiceFailed: An essential task of it has failed.
        """
        for bus in self._buses:
            if bus.failure:
                raise bus.loss()

    def abort(self) -> None:
        """Drop everything at once, from synchronous code."""
        self._stack.pop_all()
        if self._host is not None:
            self._host.abort()
        for bus in self._buses:
            bus.abort()
        self._buses.clear()
        if self._server is not None:
            self._server.stop()

    async def _embedded(self) -> str:
        sync = self._settings.loom_sync_interval or None
        self._server = await self._stack.enter_async_context(embedded_server(sync_interval=sync))
        phases = PhaseGroup(await self._connect(self._server.url, "phases"), config=self._config, llm=self._llm)
        self._stack.push_async_callback(phases.drain)
        await phases.start()
        return self._server.url

    async def _connect(self, url: str, role: str) -> Bus:
        bus = Bus(url, namespace=self._settings.loom_namespace, role=role)
        self._buses.append(bus)
        return await self._stack.enter_async_context(bus)


async def check_phases(bus: Bus) -> None:
    """Return once a phase has answered; one that cannot read its streams yet is asked again for 10 s.

    Raises:
        BusUnavailable: None does, the server is too old for any, or the streams stay away.
    """
    check_version(bus)
    give_up = time.monotonic() + STREAMS_S
    while True:
        try:
            await tasks.status(bus, f"probe-{new_id()[:8]}")
        except UnknownTask:
            return
        except BusUnavailable as error:
            no_answer = isinstance(error.__cause__, TimeoutError | NoResponders)
            if no_answer or time.monotonic() >= give_up:
                raise
        await asyncio.sleep(ASK_AGAIN_S)
