"""A cancel in every state of a task: the task ends as cancelled, the client is answered, and work stops."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from support.hanging_agents import HangingAgents
from support.nodes import node
from support.services import running_phases
from support.wait import until

from loom.agents.host.node_host import NodeHost
from loom.bus import task_client, topology
from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.bus.task_client import TaskHandle
from loom.runner.services import running_nodes
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import BusUnavailable, Cancelled, UnknownTask
from loom.schemas.record import TaskRecord
from loom.schemas.task import TaskAd

WITHIN_S = 20


@pytest.fixture
def agents() -> Iterator[HangingAgents]:
    agents = HangingAgents()
    yield agents
    agents.released.set()


@pytest.fixture
async def bus(nats_url: str, namespace: str) -> AsyncIterator[Bus]:
    async with Bus(nats_url, namespace=namespace) as bus:
        yield bus


@asynccontextmanager
async def cluster(
    bus: Bus,
    agents: HangingAgents,
    *,
    kinds: Sequence[str] = ("endless", "ignores_cancel", "threaded", "quick"),
    slots: int = 4,
    backlog: int = 16,
) -> AsyncIterator[None]:
    """All phases, and two hosts with a node of each kind."""

    def hosting(number: int) -> AbstractAsyncContextManager[NodeHost]:
        nodes = [node(f"{kind}{number}", getattr(agents, kind), **{kind: 0.9}) for kind in kinds]
        return running_nodes(
            bus.connection.url,
            lambda: nodes,
            namespace=bus.subjects.namespace,
            slots=slots,
            backlog=backlog,
            drain_timeout_s=0,
        )

    config = ClusterConfig(drain_timeout_s=0.5)
    async with (
        running_phases(bus.connection.url, namespace=bus.subjects.namespace, config=config),
        hosting(1),
        hosting(2),
    ):
        yield


async def publish(bus: Bus, node_id: str = "", domain: str = "any") -> TaskHandle:
    return await task_client.publish(bus, TaskAd(domain=domain, description="x", node_id=node_id or None), deltas=False)


async def is_cancelled(handle: TaskHandle) -> None:
    """Check that the record, the answer and a second cancel are all `cancelled`."""
    with pytest.raises(Cancelled):
        await handle.content(WITHIN_S)
    found = await handle.status()
    assert found.state == "cancelled"
    assert await handle.cancel() == found


async def test_a_cancelled_run_stops_within_a_second_on_every_host(bus: Bus, agents: HangingAgents) -> None:
    """An agent that ignores the cancel does not delay the answer."""
    async with cluster(bus, agents):
        names = [f"{kind}{host}" for kind in ("endless", "ignores_cancel", "threaded") for host in (1, 2)]
        handles = [await publish(bus, name) for name in names]
        await until(lambda: len(agents.started) == len(names), within_s=WITHIN_S, what="all run")

        begun = time.monotonic()
        records = await asyncio.gather(*(handle.cancel() for handle in handles))
        endless = {handle.task_id for handle in handles[:2]}
        await until(lambda: set(agents.stopped) == endless, within_s=1, what="the agents stop")
        with pytest.raises(Cancelled):
            await asyncio.gather(*(handle.content(WITHIN_S) for handle in handles))
        took_s = time.monotonic() - begun

        assert {record.state for record in records} == {"cancelled"}
        assert took_s < 1.5
        await asyncio.gather(*map(is_cancelled, handles))
        # The places are free again, even those of runs that would not stop.
        assert await (await publish(bus, domain="quick")).content(WITHIN_S) == "done"
        agents.released.set()


async def test_a_task_in_an_auction_or_in_a_backlog_is_cancelled(bus: Bus, agents: HangingAgents) -> None:
    async with cluster(bus, agents, kinds=("endless",), slots=1, backlog=1):
        running = [await publish(bus, "endless1"), await publish(bus, "endless2")]
        await until(lambda: len(agents.started) == 2, within_s=WITHIN_S, what="the slots are taken")
        queued = [await publish(bus), await publish(bus)]

        async def awarded() -> bool:
            records = [await handle.record() for handle in queued]
            return all(isinstance(record, TaskRecord) and record.claim.host_id for record in records)

        await until(awarded, within_s=WITHIN_S, what="the backlogs are full")
        called: list[bytes] = []

        async def record_message(msg: Msg) -> None:
            called.append(msg.data)

        auctioned = await publish(bus)
        await bus.connection.subscribe(bus.subjects.of("auction", "*"), record_message)
        await until(lambda: len(called) > 1, within_s=WITHIN_S, what="nodes are asked again and again")
        bounced = await publish(bus, "endless1")  # no auction: pinned to a node that is full

        waiting = [*queued, auctioned, bounced]
        await asyncio.gather(*(handle.cancel() for handle in waiting))
        await asyncio.gather(*map(is_cancelled, waiting))
        await asyncio.gather(*(handle.cancel() for handle in running))
        last = await publish(bus)
        await until(lambda: last.task_id in agents.started, within_s=WITHIN_S, what="the places are free again")
        await last.cancel()

    assert len(agents.started) == 3


@pytest.mark.slow
async def test_a_task_submitted_before_any_phase_runs_is_cancelled_once_one_starts(
    bus: Bus, agents: HangingAgents
) -> None:
    async with running_phases(bus.connection.url, namespace=bus.subjects.namespace):
        pass  # leaves the streams
    handle = await publish(bus)
    with pytest.raises(BusUnavailable, match="no phases answer"):
        await handle.cancel()

    async with running_phases(bus.connection.url, namespace=bus.subjects.namespace, names=("sense", "evaluate")):
        assert (await handle.cancel()).state == "cancelled"
        await is_cancelled(handle)
    async with cluster(bus, agents):
        assert await (await publish(bus, domain="quick")).content(WITHIN_S) == "done"

    assert handle.task_id not in agents.started


async def test_a_cancel_changes_no_ended_task_and_an_unknown_task_is_an_error(bus: Bus, agents: HangingAgents) -> None:
    async with cluster(bus, agents):
        handle = await publish(bus, "quick1")
        assert await handle.content(WITHIN_S) == "done"
        ended = await handle.status()

        answers = await asyncio.gather(handle.cancel(), handle.cancel(), task_client.cancel(bus, handle.task_id))

        assert answers == [ended] * 3
        assert await handle.status() == ended
        with pytest.raises(UnknownTask):
            await task_client.cancel(bus, "nobodys")


@pytest.mark.slow
async def test_a_cancel_that_races_the_result_or_another_cancel_gives_one_end(bus: Bus, agents: HangingAgents) -> None:
    async with cluster(bus, agents):
        bodies: dict[str, list[bytes]] = {}

        async def record_message(msg: Msg) -> None:
            bodies.setdefault(msg.subject.rsplit(".", 1)[1], []).append(msg.data)

        await bus.connection.subscribe(bus.subjects.of("result", "*", "*"), record_message)

        async def race(number: int) -> None:
            handle = await publish(bus, domain="quick")
            await asyncio.sleep(number * 0.001)
            answers = await asyncio.gather(handle.cancel(), handle.cancel())
            result = await handle.result(WITHIN_S)
            record = await handle.status()
            assert {answer.state for answer in answers} == {record.state} == {result.state}
            assert result.state in ("cancelled", "succeeded")

        await asyncio.gather(*(race(number) for number in range(40)))
        await bus.requests.flush()

    assert len(bodies) == 40
    assert all(len(set(results)) == 1 for results in bodies.values())  # a result may be repeated, never changed


@pytest.mark.slow
async def test_a_task_that_is_cancelled_while_it_waits_for_a_node_is_never_awarded(
    bus: Bus, agents: HangingAgents
) -> None:
    """The task waits for any node, for its pinned node, or for its subtasks."""
    plan = {"plan": {"subtasks": [{"id": "a", "description": "x", "domain": "quick"}]}}
    divided = TaskAd(domain="quick", description="x", estimated_complexity=1.0, context=plan)
    awarded: list[str] = []

    async def note(msg: Msg) -> None:
        awarded.append(msg.subject.rsplit(".", 1)[1])

    config = ClusterConfig(drain_timeout_s=0.5, no_bids_after_s=30)
    async with running_phases(bus.connection.url, namespace=bus.subjects.namespace, config=config):
        alone = [
            await publish(bus, domain="quick"),
            await publish(bus, "quick1"),
            await task_client.publish(bus, divided),
        ]

        async def all_wait() -> bool:
            return await stored(bus, bus.subjects.of("later", "*", "*", "*")) >= len(alone)

        await until(all_wait, within_s=WITHIN_S, what="they wait")
        await asyncio.gather(*(handle.cancel() for handle in alone))
        await asyncio.gather(*map(is_cancelled, alone))

        async def none_waits() -> bool:
            return await stored(bus, ">") == 0

        await until(none_waits, within_s=WITHIN_S, what="they are dropped")
        await bus.connection.subscribe(bus.subjects.task("execute", "*", "*"), note)
        nodes = [node("quick1", agents.quick, quick=0.9)]
        async with running_nodes(
            bus.connection.url, lambda: nodes, namespace=bus.subjects.namespace, drain_timeout_s=0
        ):
            last = await publish(bus, domain="quick")
            assert await last.content(WITHIN_S) == "done"
            assert awarded == [last.task_id]


async def stored(bus: Bus, subjects: str) -> int:
    state = await topology.stream_state(bus, "TASKS", subjects=subjects)
    return sum(state.get("subjects", {}).values())
