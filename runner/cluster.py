"""The one place that builds and wires things: a bus, the phases on it, a node host."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import structlog

from loom.agents.guarded_provider import GuardedProvider
from loom.agents.host import BACKLOG, SLOTS, NodeHost
from loom.agents.node import Node
from loom.agents.nursery import Nursery
from loom.bus import topology
from loom.bus.client import Bus
from loom.bus.presence import Presence
from loom.phases.adapt import Adapt
from loom.phases.evaluate import Evaluate
from loom.phases.execute import Execute
from loom.phases.match import Match
from loom.phases.scale import Scale
from loom.phases.sense import Sense
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import PHASES, Phase
from loom.schemas.llm import LLMProvider

log = structlog.get_logger()


class PhaseService(Protocol):
    """What starts and stops: each of the six phases."""

    async def start(self) -> None:
        """Return once it takes messages."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, finish for at most `timeout_s`, give the rest back."""
        ...


def build(phase: Phase, bus: Bus, config: ClusterConfig, llm: LLMProvider | None = None) -> PhaseService:
    """Return one phase's service, not yet started."""
    builders: dict[Phase, Callable[[], PhaseService]] = {
        "sense": lambda: Sense(bus, config, llm),
        "match": lambda: Match(bus, config),
        "scale": lambda: Scale(bus, config, llm),
        "execute": lambda: Execute(bus, config),
        "evaluate": lambda: Evaluate(bus, config, llm),
        "adapt": lambda: Adapt(bus, config),
    }
    return builders[phase]()


class PhaseGroup:
    """Phases on one connection, started and stopped together."""

    def __init__(
        self,
        bus: Bus,
        names: Sequence[Phase] = PHASES,
        config: ClusterConfig | None = None,
        llm: LLMProvider | None = None,
    ) -> None:
        self._bus = bus
        self._config = config or ClusterConfig()
        guarded = GuardedProvider(llm) if llm is not None else None
        self._services = [build(name, bus, self._config, guarded) for name in names]
        self._names = tuple(names)
        self._started: list[PhaseService] = []
        self._presence = Presence(bus, self._names, bus.instance)

    async def start(self) -> None:
        """Make the server's streams match, then start each phase; returns once all take messages.

        Raises:
            BusUnavailable: The server is too old, has no JetStream, or does not answer.
        """
        await topology.apply(self._bus, self._config)
        for service in self._services:
            await service.start()
            self._started.append(service)
        await self._presence.start()
        log.info("phases_started", phases=list(self._names), instance=self._bus.instance)

    async def drain(self) -> None:
        """Drain all of them side by side; safe to call twice or unstarted."""
        started, self._started = self._started, []
        await self._presence.stop()
        await asyncio.gather(*(service.drain(self._config.drain_timeout_s) for service in started))
        if started:
            log.info("phases_drained", phases=list(self._names))


@asynccontextmanager
async def running_phases(
    url: str,
    *,
    names: Sequence[Phase] = PHASES,
    namespace: str = "loom",
    config: ClusterConfig | None = None,
    llm: LLMProvider | None = None,
    patience_s: float = 2.0,
) -> AsyncIterator[Bus]:
    """Run phases on a connection of their own while the body runs."""
    role = names[0] if len(names) == 1 else "phases"
    async with Bus(url, namespace=namespace, role=role, patience_s=patience_s) as bus:
        group = PhaseGroup(bus, names, config, llm)
        try:
            await group.start()
            yield bus
        finally:
            await group.drain()


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
    patience_s: float = 2.0,
) -> AsyncIterator[NodeHost]:
    """Host nodes on a connection of their own while the body runs.

    Args:
        max_nodes: Most nodes the host may grow to by clones of these; absent: it starts none.
    """
    async with Bus(url, namespace=namespace, role="node", patience_s=patience_s) as bus:
        topology.check_version(bus)
        nursery = Nursery(bus, nodes, max_nodes=max_nodes or 0)
        host = NodeHost(bus, nursery.nodes, slots=slots, backlog=backlog)
        presence = Presence(bus, ["node"], host.host_id)
        try:
            await host.start()
            await presence.start()
            if max_nodes is not None:
                await nursery.start(host)
            yield host
        finally:
            await presence.stop()
            await nursery.stop()
            await host.drain(drain_timeout_s)
