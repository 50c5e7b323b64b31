"""Builds and connects everything else: phases on a bus, and node hosts with what starts their nodes."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol

from loom.agents.host.autoscaler import NodeAutoscaler, Skills
from loom.agents.host.node_host import BACKLOG, SLOTS, NodeHost
from loom.agents.host.slots import Node
from loom.agents.llm.guarded_provider import GuardedProvider
from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.hops.health import Health
from loom.bus.logs.logger import get_logger
from loom.bus.service_discovery import ServiceEndpoint, check_processes
from loom.bus.upkeep import keep
from loom.phases.adapt import Adapt
from loom.phases.evaluate import Evaluate
from loom.phases.execute import Execute
from loom.phases.match import Match
from loom.phases.scale import Scale
from loom.phases.sense import Sense
from loom.runner.retried_start import until_started
from loom.runner.timings import ServiceTimings
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import PHASES, Phase
from loom.schemas.errors import LoomError
from loom.schemas.identity import LOCAL, Identity
from loom.schemas.llm import AnyProvider, LLMProvider

log = get_logger()


class PhaseService(Protocol):
    """What starts and stops: each of the six phases."""

    async def start(self) -> None:
        """Return once it takes messages."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, finish for at most `timeout_s`, give the rest back."""
        ...

    def health(self) -> Health:
        """Return how far the work has got."""
        ...


def build(
    phase: Phase,
    bus: Bus,
    config: ClusterConfig,
    llm: LLMProvider | None = None,
    *,
    hosts_here: bool = False,
    timings: ServiceTimings = ServiceTimings(),
) -> PhaseService:
    """Return one phase's service, not yet started.

    Args:
        hosts_here: Whether all node hosts are in this process and start later: MATCH does not wait for others.
        timings: Waits and intervals of the services.
    """
    builders: dict[Phase, Callable[[], PhaseService]] = {
        "sense": lambda: Sense(bus, config, llm, timings=timings.sense),
        "match": lambda: Match(bus, config, hosts_here=hosts_here, timings=timings.match),
        "scale": lambda: Scale(bus, config, llm, timings=timings.scale),
        "execute": lambda: Execute(bus, config, timings=timings.execute),
        "evaluate": lambda: Evaluate(bus, config, llm, timings=timings.evaluate),
        "adapt": lambda: Adapt(bus, config, timings=timings.adapt),
    }
    return builders[phase]()


class PhaseGroup:
    """Phases on one connection, started and stopped together.

    Args:
        init: Whether to create the streams, buckets and consumers, as `loom init` does. Otherwise a start needs the
            streams and creates the consumers of its own phases. Streams that get lost later are created in both cases.
        hosts_here: Whether all node hosts are in this process and start after the phases. Otherwise MATCH asks the
            hosts to announce themselves and takes its first task half a second later.
        timings: Waits and intervals of the services.
    """

    def __init__(
        self,
        bus: Bus,
        names: Sequence[Phase] = PHASES,
        config: ClusterConfig | None = None,
        llm: AnyProvider | None = None,
        *,
        init: bool = True,
        hosts_here: bool = False,
        timings: ServiceTimings = ServiceTimings(),
    ) -> None:
        self._bus = bus
        self._init = init
        self._hosts_here = hosts_here
        self._timings = timings
        self._config = config or ClusterConfig()
        self._llm = GuardedProvider(llm) if llm is not None else None
        self._names = tuple(names)
        self._started: list[PhaseService] = []
        self._presence = ServiceEndpoint(bus, self._names, bus.instance, config=self._config)
        self._upkeep: asyncio.Task[None] | None = None

    async def start(self, *, patience_s: float = 0.0) -> None:
        """Make sure of the server's streams, then start each phase; returns once all take messages.

        Args:
            patience_s: How long a start that fails is tried again.

        Raises:
            BusUnavailable: The server is too old; or after that time it has no JetStream, does not answer, lacks or
                refuses a stream.
            WireMismatch: Streams or running processes of the namespace have another wire version.
        """
        topology.check_version(self._bus)
        await until_started(self._start, patience_s=patience_s)
        self._upkeep = self._bus.tasks.spawn(keep(self._bus, self._config), name="topology upkeep", essential=True)
        log.info("phases_started", phases=list(self._names), instance=self._bus.instance)

    async def _start(self) -> None:
        try:
            await self._lay_out()
            self._bus.jetstream.missing.clear()  # just created
            for name in self._names:
                service = build(
                    name, self._bus, self._config, self._llm, hosts_here=self._hosts_here, timings=self._timings
                )
                self._started.append(service)
                self._presence.health[name] = service.health
                await service.start()
            await self._presence.start()
        except (LoomError, TimeoutError):
            await self._stop(0)
            raise

    async def _lay_out(self) -> None:
        await check_processes(self._bus)
        if self._init:
            await topology.apply(self._bus, self._config)
            return
        await topology.check_streams(self._bus, self._config)
        for name in self._names:
            await asyncio.gather(*(topology.ensure_consumer(self._bus, lane) for lane in topology.PHASE_LANES[name]))
        await self._bus.sync_clock()

    async def drain(self) -> None:
        """Drain all of them side by side; safe to call twice or unstarted."""
        if await self._stop(self._config.drain_timeout_s):
            log.info("phases_drained", phases=list(self._names))
        if self._upkeep is not None:  # the last, as what is in hand may need a stream
            self._upkeep.cancel()

    async def _stop(self, timeout_s: float) -> bool:
        """Stop all phases that were started, if only in part, and return whether there were any."""
        started, self._started = self._started, []
        await self._presence.stop()
        await asyncio.gather(*(service.drain(timeout_s) for service in started))
        return bool(started)


@asynccontextmanager
async def phases_on(
    bus: Bus,
    names: Sequence[Phase] = PHASES,
    config: ClusterConfig | None = None,
    llm: AnyProvider | None = None,
    *,
    patience_s: float = 0.0,
    init: bool = True,
    hosts_here: bool = False,
    timings: ServiceTimings = ServiceTimings(),
) -> AsyncIterator[None]:
    """Run phases on a connection while the body runs; the arguments are those of PhaseGroup and its `start`."""
    group = PhaseGroup(bus, names, config, llm, init=init, hosts_here=hosts_here, timings=timings)
    try:
        await group.start(patience_s=patience_s)
        yield
    finally:
        await group.drain()


def build_host(
    bus: Bus,
    nodes: Callable[[], Sequence[Node]],
    *,
    slots: int = SLOTS,
    backlog: int = BACKLOG,
    max_nodes: int | None = None,
    skills: Skills | None = None,
    timings: ServiceTimings = ServiceTimings(),
) -> NodeHost:
    """Return a node host, not yet started.

    Args:
        max_nodes: Most nodes the host may grow to by clones or skills; None: it starts none.
        skills: As of NodeAutoscaler.
        timings: Intervals and limits of the services.
    """
    if max_nodes is None:
        return NodeHost(bus, nodes, slots=slots, backlog=backlog, timings=timings.host)
    autoscaler = NodeAutoscaler(bus, nodes, max_nodes=max_nodes, skills=skills)
    return NodeHost(bus, autoscaler.nodes, slots=slots, backlog=backlog, spawner=autoscaler, timings=timings.host)


class HostGroup(NamedTuple):
    """A node host with what belongs to it, started and stopped together."""

    host: NodeHost
    presence: ServiceEndpoint

    async def start(self) -> None:
        """Start the host and its endpoint."""
        await self.host.start()
        await self.presence.start()

    async def drain(self, timeout_s: float) -> None:
        """Finish runs for at most `timeout_s` and give the rest back."""
        await self.presence.stop()
        await self.host.drain(timeout_s)


@asynccontextmanager
async def running_phases(
    url: str,
    *,
    names: Sequence[Phase] = PHASES,
    namespace: str = "loom",
    config: ClusterConfig | None = None,
    llm: AnyProvider | None = None,
    identity: Identity = LOCAL,
    patience_s: float = 2.0,
    init: bool = True,
    timings: ServiceTimings = ServiceTimings(),
) -> AsyncIterator[Bus]:
    """Run phases on a connection of their own while the body runs; `init` and `timings` are those of PhaseGroup."""
    role = names[0] if len(names) == 1 else "phases"
    async with (
        Bus(url, namespace=namespace, role=role, identity=identity, patience_s=patience_s) as bus,
        phases_on(bus, names, config, llm, patience_s=patience_s, init=init, timings=timings),
    ):
        yield bus


@asynccontextmanager
async def running_nodes(
    url: str,
    nodes: Callable[[], Sequence[Node]],
    *,
    namespace: str = "loom",
    slots: int = SLOTS,
    backlog: int = BACKLOG,
    max_nodes: int | None = None,
    drain_timeout_s: float = 10.0,
    identity: Identity = LOCAL,
    patience_s: float = 2.0,
    timings: ServiceTimings = ServiceTimings(),
) -> AsyncIterator[NodeHost]:
    """Host nodes on a connection of their own while the body runs.

    Args:
        max_nodes: Most nodes the host may grow to by clones of these; absent: it starts none.
        timings: Intervals and limits of the services.
    """
    async with Bus(url, namespace=namespace, role="node", identity=identity, patience_s=patience_s) as bus:
        topology.check_version(bus)
        await check_processes(bus)

        async def start() -> HostGroup:
            host = build_host(bus, nodes, slots=slots, backlog=backlog, max_nodes=max_nodes, timings=timings)
            group = HostGroup(host, ServiceEndpoint(bus, ["node"], host.host_id))
            try:
                await group.start()
            except BaseException:
                await group.drain(0)
                raise
            return group

        group = await until_started(start, patience_s=patience_s)
        try:
            yield group.host
        finally:
            await group.drain(drain_timeout_s)
