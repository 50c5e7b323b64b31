"""A process that is stopped while it works and resumes too late changes nothing."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from support.builders import ad
from support.crash_process import QUICK, WITHIN_S, CrashProcess, each_setting, host, phase
from support.nodes import node
from support.phase_harness import Stage
from support.services import QUICK_START, running_phases
from support.wait import until

from loom.agents.host.timings import HostTimings
from loom.bus import task_client
from loom.bus.records import records
from loom.bus.task_client import TaskHandle
from loom.phases.execute.timings import ExecuteTimings
from loom.schemas.envelope import PHASES
from loom.schemas.identity import LOCAL_OWNER, node_key
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.record import TaskRecord
from loom.schemas.run import Delta, RunRequest

TIMINGS = replace(QUICK_START, host=HostTimings(heartbeat_s=0.25), execute=ExecuteTimings(silence_s=2.0))
"""Short heartbeats, and a silent host is lost after two seconds."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in each_setting(QUICK):
        monkeypatch.setattr(module, name, value)


class Client:
    """Submits one task and records every delta of it."""

    def __init__(self, stage: Stage) -> None:
        self.bus = stage.bus
        self.task = ad("endure")
        self.deltas: list[Delta] = []

    async def submit(self) -> None:
        self.handle: TaskHandle = await task_client.publish(self.bus, self.task)
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for delta in self.handle.events():
            self.deltas.append(delta)

    async def ended(self) -> TaskRecord:
        """Wait for the end of the task, and check that its deltas arrived in order."""
        await self.handle.result(WITHIN_S)
        await self._listening
        numbers = [(delta.attempt, delta.seq) for delta in self.deltas]
        assert numbers == sorted(set(numbers))
        return await self.record()

    async def record(self) -> TaskRecord:
        entry = await records(self.bus).get(self.task.task_id)
        assert entry is not None
        return entry.value

    async def learned(self, **wanted: list[float]) -> None:
        """Wait until each node has learned from these scores, and from no others."""
        bucket = self.bus.bucket("nodes", NodeProfile)

        async def scores(name: str) -> list[float]:
            entry = await bucket.get(node_key(LOCAL_OWNER, name))
            return [score.score for score in entry.value.domains["code"].scores] if entry else []

        async def so() -> bool:
            return {name: await scores(name) for name in wanted} == wanted

        await until(so, within_s=WITHIN_S, what=f"learned {wanted}")


class HeldAgent:
    """An agent that yields a text and returns once `released` is set."""

    def __init__(self) -> None:
        self.runs: Counter[int] = Counter()
        self.released = asyncio.Event()

    async def __call__(self, job: RunRequest) -> AsyncIterator[str]:
        self.runs[job.attempt] += 1
        yield "begun, "
        await self.released.wait()
        yield "ended"


async def settled(stage: Stage) -> None:
    """Wait until no message is left, and check that none is a dead letter."""

    async def so() -> bool:
        return not await stage.pending("TASKS") and not await stage.pending("INTAKE")

    await until(so, within_s=WITHIN_S, what=f"empty streams; messages: {stage.tape()}")
    assert await stage.pending("DEAD") == 0


async def lose_host(url: str, namespace: str, *, wakes: bool) -> None:
    other = HeldAgent()
    other.released.set()
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(url, namespace, TIMINGS))
        await stack.enter_async_context(running_phases(url, namespace=namespace, timings=TIMINGS))
        lost = await stack.enter_async_context(CrashProcess(host, url, namespace, "lost"))
        client = Client(stage)
        await client.submit()
        await lost.wait_for("run 1")
        await until(lambda: client.deltas, within_s=WITHIN_S, what="the first attempt's delta")
        await stage.host([node("other", other, code=0.9)])
        if wakes:
            lost.pause()
        else:
            lost.process.kill()
        record = await client.ended()
        result = record.to_result()
        assert (result.state, result.content, result.node_id, result.attempts) == (
            *("succeeded", "begun, ended"),
            *("other", 2),
        )
        if wakes:
            lost.resume()
            await lost.wait_for("stopped 1")
        await client.learned(lost=[0.0], other=[1.0])
        await settled(stage)
        assert await client.record() == record
        assert other.runs == {2: 1}
        assert {delta.attempt for delta in client.deltas} == {1, 2}
        published = [delta for delta in stage.all("delta") if delta.attempt == 1]
        assert published == [delta for delta in client.deltas if delta.attempt == 1]  # none after it resumed
        assert len(stage.all("result")) == 1


@pytest.mark.slow
async def test_a_host_stopped_or_killed_in_a_run_is_replaced_and_its_run_is_cancelled(
    nats_url: str, namespace: str
) -> None:
    """A stopped host cancels its run when it resumes."""
    await asyncio.gather(
        lose_host(nats_url, f"{namespace}-frozen", wakes=True),
        lose_host(nats_url, f"{namespace}-killed", wakes=False),
    )


async def stop_execute(url: str, namespace: str, wakes: str) -> None:
    agent = HeldAgent()
    others = [name for name in PHASES if name != "execute"]
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(url, namespace, TIMINGS))
        await stack.enter_async_context(running_phases(url, names=others, namespace=namespace, timings=TIMINGS))
        stopped = await stack.enter_async_context(CrashProcess(phase, url, namespace, "execute"))
        await stage.host([node("one", agent, code=0.9)])
        client = Client(stage)
        await client.submit()
        await until(lambda: len(client.deltas) == 2, within_s=WITHIN_S, what="a delta of the first replica")
        stopped.pause()
        if wakes == "with the result in hand":
            agent.released.set()
        replica = await stack.enter_async_context(
            running_phases(url, names=["execute"], namespace=namespace, timings=TIMINGS)
        )

        async def taken_over() -> bool:
            return (await client.record()).claim.instance == replica.instance

        await until(taken_over, within_s=WITHIN_S, what="the other replica has claimed the run")
        if wakes == "during the run":
            stopped.resume()  # it may find the message delivered to it once more, and take the run back: that is well
        agent.released.set()
        record = await client.ended()
        stopped.resume()
        await stopped.end()
        await client.learned(one=[1.0])
        await settled(stage)
        assert await client.record() == record
        assert (record.to_result().content, record.to_result().attempts) == ("begun, ended", 1)
        assert agent.runs == {1: 1}
        assert [hop.phase for hop in record.envelope.hops].count("execute") == 1
        assert not stopped.logged("run_failed")
        assert not stopped.logged("hop_failed")


@pytest.mark.slow
async def test_an_execute_replica_that_resumes_after_a_takeover_changes_nothing(nats_url: str, namespace: str) -> None:
    whens = ("during the run", "after the end", "with the result in hand")
    await asyncio.gather(*(stop_execute(nats_url, f"{namespace}-{n}", when) for n, when in enumerate(whens)))
