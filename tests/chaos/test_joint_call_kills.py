"""Tasks that share a call for bids end once, after kills of MATCH, with two replicas, with copies, after a cancel."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Self

import pytest
from msgspec.structs import replace
from support.builders import ad
from support.bus_helpers import back
from support.crash_process import SHORT_HEARTBEAT, WITHIN_S, CrashProcess, phase
from support.fake_host import FakeHost
from support.fault_scenarios import run_all, scenarios
from support.nodes import Counting, node
from support.phase_harness import Stage
from support.services import running_phases
from support.wait import until

from loom.agents.host.node_host import NodeHost
from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.records import records
from loom.runner.services import running_nodes
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import PHASES, Envelope, Phase
from loom.schemas.errors import Cancelled
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.record import TaskRecord

pytestmark = pytest.mark.usefixtures("quick")

COUNT = 12
POINTS_OF_MATCH = (
    "fetched",
    "bids called for",
    "handled, unpublished",
    "published, unconfirmed",
    "confirmed, unacked",
    "acked",
)
OTHERS = [name for name in PHASES if name != "match"]


@pytest.fixture
async def stage(nats_url: str, namespace: str) -> AsyncIterator[Stage]:
    async with Stage(nats_url, namespace) as stage:
        yield stage


async def ended(bus: Bus, task_ids: list[str]) -> list[TaskRecord]:
    """Wait until all tasks have ended, and return their records."""

    async def all_ended() -> list[TaskRecord] | None:
        entries = [await records(bus).get(task_id) for task_id in task_ids]
        found = [entry.value for entry in entries if entry and entry.value.ended]
        return found if len(found) == len(task_ids) else None

    result: list[TaskRecord] = await until(all_ended, within_s=WITHIN_S, what=f"the ends of {task_ids}")
    return result


class JointCallScenario(Stage):
    """A namespace in which twelve tasks arrive together at a MATCH that is killed or stopped at a point.

    Args:
        crash: The point, and whether a second replica of MATCH works from the start.
    """

    def __init__(
        self, url: str, namespace: str, crash: tuple[str, bool], how: signal.Signals, *, durable: bool
    ) -> None:
        assert not durable
        super().__init__(url, namespace)
        self.point, self.doubled = crash
        self.how = how
        self.agent = Counting(0.2)
        self.task_ids = [f"t{number}" for number in range(COUNT)]
        self.hosts: list[NodeHost] = []

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        enter = self._stack.enter_async_context
        await enter(running_phases(self.url, names=OTHERS, namespace=self.namespace))
        for name in ("a", "b"):
            hosted = [node(name, self.agent, code=0.9)]
            self.hosts.append(
                await enter(
                    running_nodes(self.url, partial(list, hosted), namespace=self.namespace, timings=SHORT_HEARTBEAT)
                )
            )
        return self

    async def inject(self) -> None:
        """Store the tasks for MATCH, start it, and wait until it has reached its crash point."""
        for task_id in self.task_ids:
            await task_client.publish(self.bus, ad(task_id=task_id), deltas=False)
        await self.seen("task", phase="match", count=COUNT)
        self.child = await self._stack.enter_async_context(
            CrashProcess(phase, self.url, self.namespace, "match", self.point, self.how)
        )
        if self.doubled:
            await self._start_match()
        await self.child.wait_for("crashing")

    async def _start_match(self) -> None:
        await self._stack.enter_async_context(running_phases(self.url, names=["match"], namespace=self.namespace))

    async def verify(self) -> None:
        """Start another replica, and check that each task has ended and run once."""
        for host in self.hosts:
            await back(host.bus)
        if not self.doubled:
            await self._start_match()
        await self._check(await ended(self.bus, self.task_ids))
        if self.how is signal.SIGSTOP:
            self.child.resume()
            await self.child.end()
            await self._check(await ended(self.bus, self.task_ids))

    async def _check(self, found: list[TaskRecord]) -> None:
        await until(self._learned, within_s=WITHIN_S, what=f"{self.point}: {COUNT} rewards")
        await until(self._quiet, within_s=WITHIN_S, what=f"{self.point}: empty streams; messages: {self.tape()}")
        assert {(record.state, record.envelope.attempt) for record in found} == {("succeeded", 1)}, self.point
        assert self.agent.runs == dict.fromkeys(self.task_ids, 1), self.point
        assert await self._learned(), self.point
        assert await self.pending("DEAD") == 0, self.point
        assert await ended(self.bus, self.task_ids) == found, self.point
        lots = [len(call.lots) for call in self.all("auction")]
        assert max(lots) > 1, f"{self.point}: no call was shared: {lots}"

    async def _learned(self) -> bool:
        bucket = self.bus.bucket("nodes", NodeProfile)
        profiles = [entry.value for name in ("a", "b") if (entry := await bucket.get(f"local.{name}"))]
        return sum(profile.total_tasks for profile in profiles) == COUNT

    async def _quiet(self) -> bool:
        return not await self.pending("INTAKE") and not await self.pending("TASKS")


@pytest.mark.slow
@pytest.mark.parametrize("doubled", [False, True], ids=["the only replica", "one of two replicas"])
async def test_tasks_of_a_joint_call_survive_a_match_killed_or_stopped_at_any_point(
    doubled: bool, nats_url: str, namespace: str
) -> None:
    crashes = [(point, doubled) for point in POINTS_OF_MATCH]
    await run_all(scenarios(JointCallScenario, crashes, nats_url, namespace))


@pytest.mark.slow
async def test_two_replicas_of_match_award_each_task_once(stage: Stage) -> None:
    agent = Counting()
    task_ids = [f"t{number}" for number in range(60)]
    async with running_phases(stage.url, names=OTHERS, namespace=stage.namespace):
        for task_id in task_ids:
            await task_client.publish(stage.bus, ad(task_id=task_id), deltas=False)
        await stage.seen("task", phase="match", count=len(task_ids))
        await stage.host([node("n", agent, code=0.9)])
        for _ in range(2):
            await stage.phase("match")
        found = await ended(stage.bus, task_ids)
    assert {record.state for record in found} == {"succeeded"}
    assert agent.runs == dict.fromkeys(task_ids, 1)
    passed = [envelope.task_id for envelope in stage.all("task", phase="execute")]
    assert sorted(passed) == sorted(task_ids)
    assert max(len(call.lots) for call in stage.all("auction")) > 1


def saturated(envelope: Envelope) -> Envelope:
    """Return the copy of a replica for which the winner is full."""
    assert envelope.award is not None
    return replace(envelope, award=replace(envelope.award, backlog=2))


def without_offers(envelope: Envelope) -> Envelope:
    """Return the copy of a replica that has received no offers."""
    assert envelope.spec is not None
    return replace(envelope, award=None, spec=replace(envelope.spec, no_offers_since=envelope.deadline - 60))


@pytest.mark.slow
@pytest.mark.parametrize("copy", [saturated, without_offers])
@pytest.mark.parametrize("when", ["before the run", "while it runs", "after the end"])
async def test_a_copy_that_passes_scale_while_the_other_goes_to_execute_changes_nothing(
    copy: Callable[[Envelope], Envelope], when: str, stage: Stage
) -> None:
    agent = Counting(0.0 if when == "after the end" else 1.5)
    late: list[Phase] = ["execute"] if when == "before the run" else []
    others = [name for name in PHASES if name not in late]
    await stage.host([node("n", agent, code=0.9)])
    async with running_phases(stage.url, names=others, namespace=stage.namespace):
        await task_client.publish(stage.bus, ad(task_id="t1"), deltas=False)
        passed = await stage.seen("task", phase="execute", task_id="t1")
        if when == "while it runs":
            await until(lambda: agent.runs["t1"], within_s=WITHIN_S, what="the run")
        elif when == "after the end":
            await ended(stage.bus, ["t1"])
        await stage.put("scale", copy(passed))
        await stage.seen("task", phase="execute", task_id="t1", count=2)
        async with running_phases(stage.url, names=late, namespace=stage.namespace):
            [record] = await ended(stage.bus, ["t1"])
            await stage.settled()
            assert (record.state, record.envelope.attempt) == ("succeeded", 1)
            assert agent.runs == {"t1": 1}
            assert await ended(stage.bus, ["t1"]) == [record]
            assert await stage.pending("DEAD") == 0
            assert len({reward.reward_id for reward in stage.all("reward")}) == 1


@pytest.mark.slow
async def test_a_cancel_during_a_joint_call_ends_its_task_alone(stage: Stage) -> None:
    agent = Counting()
    silent = await FakeHost(await stage.connect("node"), "silent", ("s1",)).start()
    silent.offer = lambda _: None  # an awaited host without an offer keeps the call open
    task_ids = [f"t{number}" for number in range(4)]
    async with running_phases(stage.url, names=OTHERS, namespace=stage.namespace):
        handles = {task_id: await task_client.publish(stage.bus, ad(task_id=task_id)) for task_id in task_ids}
        await stage.seen("task", phase="match", count=len(task_ids))
        await stage.host([node("n", agent, code=0.9)])
        match = await stage.phase("match", ClusterConfig(bid_window_ms=3000))
        await until(lambda: silent.calls, within_s=WITHIN_S, what="a call")
        lots = [lot.task_id for call in silent.calls for lot in call.lots]
        cancelled = lots[0]
        await task_client.cancel(stage.bus, cancelled)
        assert not stage.all("task", phase="execute"), "the call was over before the cancel"
        with pytest.raises(Cancelled):
            await handles.pop(cancelled).content(WITHIN_S)
        results = await asyncio.gather(*(handle.result(WITHIN_S) for handle in handles.values()))
        await stage.settled()
        await match.close()
    assert len(lots) > 1, "the call was not shared"
    assert all(result.success for result in results)
    assert agent.runs == dict.fromkeys(handles, 1)
    assert (await stage.read(cancelled)).state == "cancelled"
