"""A phase is killed or stopped at each point of a hop, alone or with the server: the task runs once and ends once."""

import asyncio
import signal
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Self

import pytest
from support.builders import ad
from support.bus_helpers import back
from support.crash_process import SHORT_HEARTBEAT, WITHIN_S, CrashProcess, phase
from support.fault_scenarios import run_all, scenarios
from support.nodes import node
from support.phase_harness import Asker, Stage
from support.services import running_phases
from support.wait import until

from loom.agents.host.node_host import NodeHost
from loom.bus import task_client, topology
from loom.bus.records import records
from loom.runner.server.nats_server import NatsServer
from loom.runner.services import running_nodes
from loom.schemas.base import decode
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import PHASES, Phase
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.record import TaskRecord
from loom.schemas.run import RunRequest
from loom.schemas.task import TaskResult

pytestmark = pytest.mark.usefixtures("quick")

HOP = ("fetched", "handled, unpublished", "published, unconfirmed", "confirmed, unacked", "acked")
RUNNING = ("recorded", "relayed")
RUN_S = 2.0  # longer than a message of a dead replica takes to come again: it meets the run alive


class Crash(NamedTuple):
    """The phase that crashes, the point, and the kind of task."""

    phase: Phase
    point: str
    task: str = "plain"
    """One of plain, whole, early, refused, cancelled.

    SCALE keeps a whole task undivided. An early task is submitted before a node is present. The first attempt of a
    refused task fails. A cancelled task is cancelled while it runs.
    """


CRASHES: dict[str, Sequence[Crash]] = {
    "sense": [Crash("sense", point) for point in (*HOP, "recorded", "submission stored")],
    "sense, cancelling": [
        Crash("sense", point, "cancelled") for point in ("cancel sent to evaluate", "cancel recorded")
    ],
    "match": [Crash("match", point) for point in HOP],
    "scale": [Crash("scale", point, "whole") for point in (*HOP, "plan stored")],
    "scale, without offers": [Crash("scale", point, "early") for point in HOP],
    "execute": [Crash("execute", point) for point in (*HOP, "recorded", "relayed")],
    "evaluate at the end": [
        Crash("evaluate", point)
        for point in ("fetched", "recorded", "rewarded", "announced", "confirmed, unacked", "acked")
    ],
    "evaluate sending back": [
        Crash("evaluate", point, "refused")
        for point in (
            "fetched",
            "reward stored",
            "handled, unpublished",
            "published, unconfirmed",
            "confirmed, unacked",
        )
    ],
    "adapt": [Crash("adapt", "learned")],
}


class CrashScenario(Stage):
    """A namespace in which one phase runs in a process that is killed or stopped."""

    def __init__(self, url: str, namespace: str, crash: Crash, how: signal.Signals, *, durable: bool) -> None:
        super().__init__(url, namespace)
        self.how = how
        self.crash = crash
        self.runs: Counter[int] = Counter()
        """Attempt -> number of runs."""
        self.hosts: list[NodeHost] = []
        self.task = ad("survive", context={"plan": True} if crash.task == "whole" else {})
        self._durable = durable

    async def _lay_out(self) -> None:
        if self._durable:
            await topology.apply(self.bus, ClusterConfig())
        else:
            await super()._lay_out()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        healthy = [name for name in PHASES if name != self.crash.phase]
        enter = self._stack.enter_async_context
        self.child = await enter(CrashProcess(phase, self.url, self.namespace, *self.crash[:2], self.how))
        await enter(running_phases(self.url, names=healthy, namespace=self.namespace))
        if self.crash.task != "early":
            await self._start_hosts()
        return self

    async def _start_hosts(self) -> None:
        enter = self._stack.enter_async_context
        for name in ("a", "b"):  # two hosts: a second auction may well be won by the other
            hosted = [node(name, self._agent, code=0.9)]
            self.hosts.append(
                await enter(
                    running_nodes(self.url, partial(list, hosted), namespace=self.namespace, timings=SHORT_HEARTBEAT)
                )
            )

    async def _agent(self, job: RunRequest) -> str:
        self.runs[job.attempt] += 1
        if self.crash.task == "refused" and job.attempt == 1:
            raise RuntimeError("not today")
        if self.crash.phase not in ("evaluate", "adapt"):
            await asyncio.sleep(WITHIN_S if self.crash.task == "cancelled" else RUN_S)
        return f"survived attempt {job.attempt}"

    async def inject(self) -> None:
        """Submit the task, and wait until the phase has reached its crash point."""
        self.client = Asker(self.bus)
        await self.client.ask(self.bus.subjects.submit, self.task)
        if self.crash.task == "cancelled":
            await until(lambda: self.runs[1], within_s=WITHIN_S, what="the run")
            await self.bus.connection.publish(self.bus.subjects.of("cancel", self.task.task_id))
        await self.child.wait_for("crashing")

    async def verify(self) -> None:
        """Start another replica, and check how the task ends."""
        if not self.hosts:
            await self._start_hosts()
        if not (self.crash.phase == "execute" and self.crash.point in RUNNING):
            for host in self.hosts:  # a host that is still gone is lost; not so one whose run may be going on
                await back(host.bus)
        await self._stack.enter_async_context(
            running_phases(self.url, names=[self.crash.phase], namespace=self.namespace)
        )
        record = await until(self._ended, within_s=WITHIN_S, what=f"{self.crash}: the end; messages: {self.tape()}")
        await self._check(record)
        if self.how is signal.SIGSTOP:  # the stopped process continues
            self.child.resume()
            await self.child.end()
            await self._check(record)
        await self._answered(record, required=not self._durable)

    async def _check(self, record: TaskRecord) -> None:
        """Check that the streams are empty, and that the task has the right state, runs and rewards."""
        attempts = 2 if self.crash.task == "refused" else 1
        rewards = 0 if self.crash.task == "cancelled" else attempts
        await until(lambda: self._learned(rewards), within_s=WITHIN_S, what=f"{self.crash}: {rewards} rewards")
        await until(self._quiet, within_s=WITHIN_S, what=f"{self.crash}: empty streams; messages: {self.tape()}")
        assert record.state == ("cancelled" if self.crash.task == "cancelled" else "succeeded"), (self.crash, record)
        assert self.runs == dict.fromkeys(range(1, attempts + 1), 1), self.crash
        assert await self._ended() == record, self.crash
        assert await self._learned(rewards), self.crash
        assert await self.pending("DEAD") == 0, self.crash
        if record.state == "succeeded":
            assert record.to_result().content == f"survived attempt {attempts}", self.crash

    async def _ended(self) -> TaskRecord | None:
        entry = await records(self.bus).get(self.task.task_id)
        return entry.value if entry and entry.value.ended else None

    async def _learned(self, rewards: int) -> bool:
        """Return whether the nodes have learned from exactly `rewards` rewards."""
        bucket = self.bus.bucket("nodes", NodeProfile)
        profiles = [entry.value for name in ("a", "b") if (entry := await bucket.get(f"local.{name}"))]
        return sum(profile.total_tasks for profile in profiles) == rewards

    async def _quiet(self) -> bool:
        return not await self.pending("INTAKE") and not await self.pending("TASKS")

    async def _answered(self, record: TaskRecord, *, required: bool) -> None:
        """Check that the client was answered, and that a status request returns the same result."""
        if required:
            await until(lambda: self.client.answers, within_s=WITHIN_S, what=f"{self.crash}: an answer")
        if record.state == "succeeded":
            assert {decode(msg.data, TaskResult) for msg in self.client.answers} <= {record.to_result()}, self.crash
        assert await task_client.status(self.bus, self.task.task_id) == record.to_result(), self.crash


@pytest.mark.slow
async def test_a_task_survives_a_phase_killed_half_way_and_then_the_server(server: NatsServer, namespace: str) -> None:
    halves = [
        Crash("sense", "recorded"),
        Crash("match", "confirmed, unacked"),
        Crash("execute", "relayed"),
        Crash("evaluate", "recorded"),
    ]
    await run_all(
        scenarios(CrashScenario, halves, server.url, namespace, signals=[signal.SIGKILL], durable=True), server
    )


@pytest.mark.slow
@pytest.mark.parametrize("where", CRASHES)
async def test_a_task_survives_a_phase_killed_or_stopped_at_any_point(
    where: str, nats_url: str, namespace: str
) -> None:
    await run_all(scenarios(CrashScenario, CRASHES[where], nats_url, namespace))


@pytest.mark.slow
@pytest.mark.parametrize("where", CRASHES)
async def test_a_task_survives_a_phase_and_then_the_server_at_any_point(
    where: str, server: NatsServer, namespace: str
) -> None:
    """The phase is killed or stopped first, then the server is killed and restarted."""
    await run_all(scenarios(CrashScenario, CRASHES[where], server.url, namespace, durable=True), server)
