"""The clock of one machine steps by an hour at run time: no task fails, and no deadline moves."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.command import Command, command, loom
from support.nodes import node
from support.services import running_phases
from support.streams import create_streams

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.runner.server.nats_server import NatsServer
from loom.runner.services import running_nodes
from loom.schemas.envelope import PHASES
from loom.schemas.run import RunRequest
from loom.schemas.task import TaskAd, TaskResult

LATE_S = 2.0
TIMEOUT_S = 3.0
STEPS_S = (3600.0, -3600.0)
AGENTS = """
import asyncio
from collections import Counter
from loom.types import AgentNode, CapabilityProfile
runs = Counter()
async def work(job):
    runs[job.task_id] += 1
    words = job.description.split()
    if words[0] == "once" and job.attempt == 1:
        raise RuntimeError("a first attempt fails")
    await asyncio.sleep(30 if words[0] == "long" else 0.01)
    return "done"
nodes = [AgentNode(id=n, agent=work, capabilities=CapabilityProfile(scores={"code": 0.9})) for n in ("a", "b")]
"""
PLAN = {"plan": [{"id": "a", "description": "part a"}, {"id": "b", "description": "part b", "dependencies": ["a"]}]}


async def done(bus: Bus, description: str, **facts: Any) -> TaskResult:
    handle = await task_client.publish(bus, TaskAd(domain="code", description=description, **facts), deltas=False)
    return await handle.result(30)


async def works_as_ever(bus: Bus, when: str) -> None:
    """Tasks of every kind at once: plain, divided, failing at first, and too long for their deadline."""
    begun = time.monotonic()

    async def late() -> float:
        result = await done(bus, "long work", timeout_s=TIMEOUT_S)
        assert result.error is not None, when
        assert result.error.code == "deadline_exceeded", when
        return time.monotonic() - begun

    took_s, *results = await asyncio.gather(
        late(),
        *(done(bus, f"plain {n}", timeout_s=60) for n in range(10)),
        done(bus, "divided", timeout_s=60, context=PLAN, estimated_complexity=0.9),
        done(bus, "once more", timeout_s=60),
    )
    assert [result.state for result in results] == ["succeeded"] * len(results), when
    assert TIMEOUT_S - 0.1 <= took_s <= TIMEOUT_S + LATE_S, when


@pytest.mark.slow
@pytest.mark.parametrize("step_s", STEPS_S)
async def test_a_clock_step_of_a_process_with_all_services_changes_nothing(
    nats_url: str, namespace: str, step_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    ahead_s = 0.0
    monkeypatch.setattr(time, "time", lambda: real() + ahead_s)

    async def work(job: RunRequest) -> str:
        await asyncio.sleep(30 if job.description.startswith("long") else 0.01)
        return "done"

    nodes = [node("a", work, code=0.9)]
    async with (
        running_phases(nats_url, namespace=namespace),
        running_nodes(nats_url, lambda: nodes, namespace=namespace, drain_timeout_s=0),
        Bus(nats_url, namespace=namespace) as bus,
    ):
        begun = time.monotonic()
        waiting = asyncio.ensure_future(done(bus, "long work", timeout_s=1))
        await asyncio.sleep(0)
        ahead_s = step_s
        assert (await done(bus, "plain", timeout_s=20)).state == "succeeded"
        late = await waiting
        assert late.error is not None
        assert late.error.code == "deadline_exceeded"
        assert 0.9 <= time.monotonic() - begun <= 1 + LATE_S


class Machines:
    """A server, and each phase and a node host on separate machines."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self._stack = AsyncExitStack()

    def step(self, name: str, seconds: float) -> None:
        """Set the offset of a machine's clock."""
        file = self.folder / f"{name}.step"
        file.with_suffix(".new").write_text(str(seconds))
        file.with_suffix(".new").replace(file)

    async def start(self, name: str, *words: str) -> Command:
        self.step(name, 0)
        return await self._stack.enter_async_context(
            command(
                self.folder,
                *(sys.executable, "-m", "support.stepped_loom", *words),
                NATS_URL=self.url,
                STEP_FILE=str(self.folder / f"{name}.step"),
                PYTHONPATH=str(Path(__file__).parents[1]),
            )
        )

    async def close(self) -> None:
        await self._stack.aclose()


@asynccontextmanager
async def machines(folder: Path, url: str) -> AsyncIterator[Machines]:
    agents = folder / "agents.py"
    agents.write_text(AGENTS)
    all_of_them = Machines(folder, url)
    await create_streams(url)
    try:
        running = [await all_of_them.start(name, "phase", "run", name) for name in PHASES]
        running.append(await all_of_them.start("node", "host", "run", str(agents), "--slots", "8"))
        await asyncio.gather(*(each.wait_for_output(" on nats://") for each in running))
        yield all_of_them
    finally:
        await all_of_them.close()


async def clock_findings(folder: Path, url: str) -> list[str]:
    ended = await loom(folder, "doctor", "--json", NATS_URL=url)
    findings = [json.loads(line) for line in ended.out.splitlines()]
    return [finding["message"] for finding in findings if finding["about"] == "clock" and finding["mark"] != "ok"]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_clock_step_on_one_machine_ends_no_task_and_moves_no_deadline(
    server: NatsServer, tmp_path: Path
) -> None:
    """The clock of each machine in turn jumps by an hour, and `loom doctor` reports which one."""
    async with machines(tmp_path, server.url) as all_of_them, Bus(server.url) as bus:
        await works_as_ever(bus, "before any step")
        for name in (*PHASES, "node"):
            for step_s in STEPS_S:
                all_of_them.step(name, step_s)
                await works_as_ever(bus, f"{name} stepped by {step_s} s")
                [finding] = await clock_findings(tmp_path, server.url)
                assert f"the wall clock of loom-{name} (" in finding
                assert ("ahead of" if step_s > 0 else "behind") in finding
            all_of_them.step(name, 0)
        assert await clock_findings(tmp_path, server.url) == []


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("wrong_s", STEPS_S)
async def test_a_machine_that_starts_with_a_wrong_clock_works_before_and_after_a_fix(
    server: NatsServer, tmp_path: Path, wrong_s: float
) -> None:
    agents = tmp_path / "agents.py"
    agents.write_text(AGENTS)
    all_of_them = Machines(tmp_path, server.url)
    await create_streams(server.url)
    try:
        rest = await all_of_them.start("rest", "phase", "run", *(name for name in PHASES if name != "execute"))
        wrong = await all_of_them.start("wrong", "phase", "run", "execute")
        all_of_them.step("wrong", wrong_s)  # read before the interpreter has imported anything of ours
        host = await all_of_them.start("node", "host", "run", str(agents), "--slots", "8")
        await asyncio.gather(*(each.wait_for_output(" on nats://") for each in (rest, wrong, host)))
        async with Bus(server.url) as bus:
            await works_as_ever(bus, "with the wrong clock")
            all_of_them.step("wrong", 0)
            await works_as_ever(bus, "with the right clock")
    finally:
        await all_of_them.close()
