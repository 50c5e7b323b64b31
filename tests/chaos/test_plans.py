"""SCALE is killed or stopped at each point of a plan: the parent ends once, and no subtask runs twice."""

import asyncio
import signal
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import pytest
from support.builders import ad
from support.crash_process import SHORT_HEARTBEAT, WITHIN_S, CrashProcess, phase
from support.fault_scenarios import run_all, scenarios
from support.nodes import node
from support.phase_harness import Stage
from support.services import running_phases
from support.wait import until

from loom.bus import task_client, topology
from loom.bus.records import records
from loom.phases.scale.subtask_graph import child_id
from loom.runner.server.nats_server import NatsServer
from loom.runner.services import running_nodes
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import PHASES
from loom.schemas.plan import SplitPlan
from loom.schemas.record import TaskRecord
from loom.schemas.run import RunRequest

pytestmark = pytest.mark.usefixtures("quick")

PLAN: dict[str, Sequence[str]] = {"top": (), "left": ("top",), "right": ("top",), "end": ("left", "right")}
HEALTHY = [name for name in PHASES if name != "scale"]


class Crash(NamedTuple):
    """The point where SCALE crashes, and the expected state of the task."""

    point: str
    ends: str = "succeeded"
    """succeeded; failed: `left` does; cancelled: by its client, while `top` runs."""


CRASHES: dict[str, Sequence[Crash]] = {
    "dividing": [Crash("plan stored"), Crash("timer set"), Crash("subtask stored"), Crash("confirmed, unacked")],
    "going on": [Crash("plan recorded"), Crash("plan joining"), Crash("timer removed"), Crash("plan done")],
    "failing": [Crash("plan done", "failed"), Crash("timer removed", "failed"), Crash("subtask cancelled", "failed")],
    "cancelled": [Crash("plan done", "cancelled"), Crash("subtask cancelled", "cancelled")],
}


class CrashScenario(Stage):
    """A namespace in which SCALE runs in a process that is killed or stopped."""

    def __init__(self, url: str, namespace: str, crash: Crash, how: signal.Signals, *, durable: bool) -> None:
        super().__init__(url, namespace)
        self.crash, self.how = crash, how
        self.runs: Counter[tuple[str, int]] = Counter()
        """(task id, attempt) -> number of runs."""
        self.task = ad("all", context={"plan": [self._part(name) for name in PLAN]})
        self.family = [self.task.task_id, *(child_id(self.task.task_id, name) for name in PLAN)]
        self._durable = durable

    def _part(self, name: str) -> dict[str, Any]:
        return {"id": name, "description": name, "dependencies": PLAN[name]}

    async def _lay_out(self) -> None:
        if self._durable:
            await topology.apply(self.bus, ClusterConfig())
        else:
            await super()._lay_out()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        enter = self._stack.enter_async_context
        self.child = await enter(CrashProcess(phase, self.url, self.namespace, "scale", self.crash.point, self.how))
        await enter(running_phases(self.url, names=HEALTHY, namespace=self.namespace))
        for name in ("a", "b"):
            hosted = [node(name, self._agent, code=0.9)]
            await enter(
                running_nodes(self.url, partial(list, hosted), namespace=self.namespace, timings=SHORT_HEARTBEAT)
            )
        return self

    async def _agent(self, job: RunRequest) -> str:
        self.runs[job.task_id, job.attempt] += 1
        if self.crash.ends == "cancelled" or (self.crash.ends == "failed" and job.description == "right"):
            await asyncio.sleep(WITHIN_S)
        if self.crash.ends == "failed" and job.description == "left":
            raise RuntimeError("not today")
        return f"{job.description}({', '.join(job.inputs.values())})"

    async def inject(self) -> None:
        """Submit the task, and wait until SCALE has reached its crash point."""
        await task_client.publish(self.bus, self.task, deltas=False)
        if self.crash.ends == "cancelled":
            await until(lambda: self.runs, within_s=WITHIN_S, what="a subtask runs")
            await self.bus.connection.publish(self.bus.subjects.of("cancel", self.task.task_id))
        await self.child.wait_for("crashing")

    async def verify(self) -> None:
        """Start another replica, and check how the task and its subtasks end."""
        await self._stack.enter_async_context(running_phases(self.url, names=["scale"], namespace=self.namespace))
        record = await self._check()
        if self.how is signal.SIGSTOP:  # the stopped process continues
            self.child.resume()
            await self.child.end()
            assert await self._check() == record, self.crash

    async def _check(self) -> TaskRecord:
        """Check that all tasks have the right state, no attempt ran twice, and the streams are empty."""
        await until(self._over, within_s=2 * WITHIN_S, what=f"{self.crash}: the end; messages: {self.tape()}")
        found = {name: await self._record(name) for name in self.family}
        record = found[self.task.task_id]
        assert record is not None
        assert record.state == self.crash.ends, (self.crash, record.to_result())
        assert set(self.runs.values()) <= {1}, (self.crash, self.runs)
        assert await self.pending("DEAD") == 0, self.crash
        entry = await self.bus.bucket("plans", SplitPlan).get(self.task.task_id)
        assert entry is not None
        assert entry.value.state == "done", self.crash
        if record.state == "succeeded":
            whole = "top(), left(top()), right(top()), end(left(top()), right(top()))"
            assert record.to_result().content == f"all({whole})", self.crash
            assert {task_id for task_id, _ in self.runs} == set(self.family), self.crash
        elif record.state == "failed":
            assert record.to_result().error is not None
            assert record.to_result().error.code == "subtask_failed", (self.crash, record.to_result())  # type: ignore[union-attr]
            assert found[child_id(self.task.task_id, "right")].state == "cancelled"  # type: ignore[union-attr]
        return record

    async def _over(self) -> bool:
        if await self.pending("INTAKE") or await self.pending("TASKS"):
            return False
        found = [record for name in self.family if (record := await self._record(name))]
        return self.task.task_id in {one.task_id for one in found} and all(record.ended for record in found)

    async def _record(self, task_id: str) -> TaskRecord | None:
        entry = await records(self.bus).get(task_id)
        return entry.value if entry else None


@pytest.mark.slow
async def test_a_divided_task_survives_scale_killed_half_way(nats_url: str, namespace: str) -> None:
    halves = [Crash("plan stored"), Crash("plan recorded"), Crash("plan joining"), Crash("plan done", "cancelled")]
    await run_all(scenarios(CrashScenario, halves, nats_url, namespace, signals=[signal.SIGKILL]))


@pytest.mark.slow
@pytest.mark.parametrize("when", CRASHES)
async def test_a_divided_task_survives_scale_killed_or_stopped_at_any_point(
    when: str, nats_url: str, namespace: str
) -> None:
    await run_all(scenarios(CrashScenario, CRASHES[when], nats_url, namespace))


@pytest.mark.slow
@pytest.mark.parametrize("when", CRASHES)
async def test_a_divided_task_survives_scale_and_then_the_server_at_any_point(
    when: str, server: NatsServer, namespace: str
) -> None:
    """SCALE is killed or stopped first, then the server is killed and restarted."""
    await run_all(scenarios(CrashScenario, CRASHES[when], server.url, namespace, durable=True), server)
