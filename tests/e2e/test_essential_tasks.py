"""A process whose essential task has failed ends with the reason; a Runtime raises it and ends no program."""

import sys
from pathlib import Path
from typing import Any

import pytest
from support.builders import reward
from support.command import command
from support.streams import create_streams

from loom import Runtime, TaskAd
from loom.bus.bus import Bus
from loom.bus.natsio.background_tasks import ServiceFailed
from loom.bus.rewards import RewardBus
from loom.phases.adapt.service import Adapt
from loom.schemas.errors import BusUnavailable
from loom.types import CapabilityProfile

LOOM = (sys.executable, "-m", "support.failing_loom")
TESTS = str(Path(__file__).parents[1])


def shout(text: str) -> str:
    return text.upper()


REASON = "ValueError: a value that the code does not expect"


@pytest.mark.slow
async def test_a_phase_whose_reader_fails_ends_with_the_reason(
    on_bus: tuple[str, str], client: Bus, tmp_path: Path
) -> None:
    url, namespace = on_bus
    env = {"NATS_URL": url, "LOOM_NAMESPACE": namespace, "PYTHONPATH": TESTS}
    await create_streams(url, namespace)
    async with command(tmp_path, *LOOM, "phase", "run", "adapt", **env) as running:
        await running.wait_for_output("phases_started")
        await RewardBus(bus=client).publish(reward(1))
        ended = await running.end()
    assert ended.code == 1
    assert f"service_failed: an essential task has failed (apply rewards: {REASON})" in ended.err


@pytest.mark.slow
async def test_a_host_whose_heartbeats_fail_ends_with_the_reason(on_bus: tuple[str, str], tmp_path: Path) -> None:
    url, namespace = on_bus
    file = tmp_path / "nodes.py"
    file.write_text("from loom.types import AgentNode\nnodes = [AgentNode(id='n', agent=str.upper)]\n")
    env = {"NATS_URL": url, "LOOM_NAMESPACE": namespace, "PYTHONPATH": TESTS}
    async with command(tmp_path, *LOOM, "host", "run", str(file), **env) as running:
        ended = await running.end()
    assert ended.code == 1
    assert f"service_failed: an essential task has failed (announce: {REASON})" in ended.err


@pytest.mark.slow
async def test_an_embedded_runtime_raises_the_reason_and_works_again_once_reopened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NATS_URL", raising=False)
    rt = Runtime()
    rt.add_agent(shout, name="n", capabilities=CapabilityProfile(scores={"code": 0.9}))
    task: Any = {"domain": "code", "estimated_complexity": 0.1}
    async with rt:
        assert await rt.submit(TaskAd(description="one", **task)) == "ONE"
        session = rt._sessions._session
        assert session is not None
        with monkeypatch.context() as patch:
            patch.setattr(Adapt, "_process", _fail)
            await RewardBus(bus=session.bus).publish(reward(1))
            phases = next(bus for bus in session._buses if bus.role == "phases")
            await phases.tasks.lost.wait()
        with pytest.raises(ServiceFailed, match="apply rewards"):
            await rt.submit(TaskAd(description="two", **task))
    async with rt:
        assert await rt.submit(TaskAd(description="three", **task)) == "THREE"


@pytest.mark.slow
async def test_a_runtime_whose_phases_fail_at_once_leaves_no_server_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NATS_URL", raising=False)
    monkeypatch.setattr(Adapt, "_read", _fail_at_once)
    async with Runtime() as rt:
        assert rt._sessions._session is not None
        url = rt._sessions._session.bus.connection.url
        phases = next(bus for bus in rt._sessions._session._buses if bus.role == "phases")
        await phases.tasks.lost.wait()
        with pytest.raises(ServiceFailed, match="apply rewards"):
            await rt.submit(TaskAd(description="one"))
    with pytest.raises(BusUnavailable):
        await Bus(url).connect()


async def _fail_at_once(_self: Any) -> None:
    raise ValueError("poison")


def _fail(_self: Any, _message: Any) -> None:
    raise ValueError("poison")
