"""EXECUTE is killed or stopped while a run waits for a delegated task: both run once and end once."""

import asyncio
import signal
from collections import Counter
from contextlib import AsyncExitStack
from functools import partial

import pytest
from support.builders import ad
from support.crash_process import SHORT_HEARTBEAT, WITHIN_S, CrashProcess
from support.delegation_crash_points import POINTS, execute
from support.nodes import node
from support.phase_harness import Stage
from support.services import running_phases
from support.wait import until

from loom import delegate
from loom.bus import task_client
from loom.runner.services import running_nodes
from loom.schemas.envelope import PHASES
from loom.schemas.run import RunRequest

pytestmark = pytest.mark.usefixtures("quick")


class CrashScenario(Stage):
    """A namespace in which EXECUTE is killed or stopped; its one node has one slot."""

    def __init__(self, url: str, namespace: str, point: str, how: signal.Signals) -> None:
        super().__init__(url, namespace)
        self.point, self.how = point, how
        self.runs: Counter[str] = Counter()

    async def agent(self, job: RunRequest) -> str:
        self.runs[job.description] += 1
        if job.depth:
            return "four"
        return f"the answer is {await delegate('part', domain='code')}"

    async def run(self) -> None:
        """Run the scenario, and check how the task and its delegated part end."""
        enter = self._stack.enter_async_context
        child = await enter(CrashProcess(execute, self.url, self.namespace, self.point, self.how))
        others = [name for name in PHASES if name != "execute"]
        await enter(running_phases(self.url, names=others, namespace=self.namespace))
        hosted = [node("a", self.agent, code=0.9)]
        await enter(
            running_nodes(self.url, partial(list, hosted), namespace=self.namespace, slots=1, timings=SHORT_HEARTBEAT)
        )
        handle = await task_client.publish(self.bus, ad("whole", timeout_s=120))
        await child.wait_for("crashing")
        await enter(running_phases(self.url, names=["execute"], namespace=self.namespace))
        result = await handle.result(2 * WITHIN_S)
        await until(self._quiet, within_s=WITHIN_S, what=f"{self.point}: empty streams; messages: {self.tape()}")
        if self.how is signal.SIGSTOP:
            child.resume()
            await child.end()
            await until(self._quiet, within_s=WITHIN_S, what=f"{self.point}: still empty; messages: {self.tape()}")
        assert (result.state, result.content, result.attempts) == ("succeeded", "the answer is four", 1), self.point
        assert self.runs == {"whole": 1, "part": 1}, self.point
        record = await self.read(handle.task_id)
        (part,) = record.delegated
        assert (await self.read(part)).state == "succeeded", self.point
        assert await self.pending("DEAD") == 0, self.point

    async def _quiet(self) -> bool:
        return not await self.pending("INTAKE") and not await self.pending("TASKS")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_delegation_survives_execute_killed_or_stopped_at_any_point(
    how: signal.Signals, nats_url: str, namespace: str
) -> None:
    async with AsyncExitStack() as stack:
        scenarios = [CrashScenario(nats_url, f"{namespace}-{n}", point, how) for n, point in enumerate(POINTS)]
        await asyncio.gather(*(stack.enter_async_context(scenario) for scenario in scenarios))
        await asyncio.gather(*(scenario.run() for scenario in scenarios))
