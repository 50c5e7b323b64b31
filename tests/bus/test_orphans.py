"""Messages that no consumer will deliver are not work in flight; they are found and removed, and no others."""

import asyncio
from typing import Any

import pytest
from support.builders import ad, envelope, submission
from support.loop_harness import put
from support.phase_harness import Stage
from support.wait import until

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.hops import orphans
from loom.bus.hops.hop_loop import schedule
from loom.bus.hops.orphans import find_orphans, sweep
from loom.bus.topology import EXECUTE_LANE, MATCH_LANES, SENSE_LANE, Lane
from loom.runner.doctor.diagnosis import stuck
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope
from loom.schemas.task import TaskAd

HAS_RESET = (2, 14)


@pytest.fixture(autouse=True)
def old_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages count as old from the moment they are stored."""
    monkeypatch.setattr(orphans, "LEAST_AGE_S", -60.0)


def hop(stage: Stage, task_id: str) -> Envelope:
    return envelope(TaskAd(task_id=task_id, description="x"), now=stage.bus.clock.now())


async def settle_without_removing(bus: Bus, lane: Lane) -> None:
    """Make the server count all stored messages as acknowledged and keep them, as it has been observed to do."""
    if bus.connection.server_version < HAS_RESET:
        pytest.skip("this nats-server has no call that resets a consumer")
    stream = bus.subjects.stream(lane.stream)
    state = await topology.stream_state(bus, lane.stream)
    await bus.jetstream.api(f"CONSUMER.RESET.{stream}.{lane.name}", {"seq": state["last_seq"] + 1})


async def orphan(stage: Stage, task_id: str, phase: str = "execute", lane: Lane = EXECUTE_LANE, **record: Any) -> int:
    """Store a settled hop of a task that has ended, and return its sequence."""
    await stage.record(hop(stage, task_id), **{"state": "succeeded", "ended_at": stage.bus.clock.now(), **record})
    seq = await put(stage.bus, hop(stage, task_id), phase)
    await settle_without_removing(stage.bus, lane)
    return seq


async def found(bus: Bus) -> list[int]:
    return [one.seq for one in (await find_orphans(bus)).orphans]


@pytest.mark.parametrize(
    ("phase", "lane"), [("execute", EXECUTE_LANE), ("match", MATCH_LANES[1]), ("sense", SENSE_LANE)]
)
async def test_a_settled_message_of_an_ended_task_is_an_orphan(stage: Stage, phase: str, lane: Lane) -> None:
    seq = await orphan(stage, "t1", phase, lane)
    assert await found(stage.bus) == [seq]
    assert await topology.in_flight(stage.bus) == 0


@pytest.mark.parametrize(
    "where", ["later.match.x.y", "task.unknown.low.t1", "task.execute.low.t1.more", "task.match.urgent.t1"]
)
async def test_a_message_no_consumer_looks_for_is_an_orphan(stage: Stage, where: str) -> None:
    ack = await stage.bus.jetstream.publish(f"{stage.namespace}.{where}", b"{}")
    assert await found(stage.bus) == [ack.seq]


async def test_work_and_timers_are_not_orphans(stage: Stage) -> None:
    s = stage.bus.subjects
    at = stage.bus.clock.now() + 99
    for phase in ("sense", "match", "scale", "execute", "evaluate"):
        await put(stage.bus, hop(stage, f"{phase}1"), phase)
    await schedule(
        stage.bus,
        s.later("scale", "p", "timer"),
        target=s.task("scale", "low", "p"),
        at=at,
        message=hop(stage, "p"),
        msg_id="x",
    )
    await stage.record(hop(stage, "execute1"))
    await orphan(stage, "running", state="running", ended_at=None)
    await put(stage.bus, hop(stage, "behind"), "execute")
    assert await found(stage.bus) == []
    assert await topology.in_flight(stage.bus) == 5  # the first two hops to EXECUTE are settled


async def test_a_consumer_that_is_missing_makes_no_orphans(stage: Stage) -> None:
    await stage.record(hop(stage, "t1"), state="succeeded", ended_at=stage.bus.clock.now())
    await put(stage.bus, hop(stage, "t1"), "execute")
    await stage.bus.jetstream.api(f"CONSUMER.DELETE.{stage.bus.subjects.stream('TASKS')}.execute")
    with pytest.raises(Exception, match="consumer not found"):
        await find_orphans(stage.bus)


async def test_young_messages_are_left_alone(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "LEAST_AGE_S", 60.0)
    await orphan(stage, "t1")
    assert (await find_orphans(stage.bus)).orphans == []


async def test_a_sweep_is_bounded_and_the_next_one_goes_on_behind_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "MAX_MESSAGES", 3)
    for n in range(4):
        await stage.bus.jetstream.publish(stage.bus.subjects.later("scale", "x", f"y{n}"), b"{}")
    first = await find_orphans(stage.bus)
    second = await find_orphans(stage.bus, start_seq=first.next_seq)
    assert [one.seq for one in first.orphans] == [1, 2, 3]
    assert [one.seq for one in second.orphans] == [4]
    assert second.next_seq == 1


async def test_sweepers_side_by_side_remove_orphans_and_nothing_else(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "SWEEP_S", 0.02)
    for n in range(3):
        await orphan(stage, f"t{n}")
    kept = await put(stage.bus, hop(stage, "kept"), "match")
    sweepers = [asyncio.create_task(sweep(stage.bus)) for _ in range(2)]
    await stage.settled(left=1)
    for sweeper in sweepers:
        sweeper.cancel()
    await asyncio.gather(*sweepers, return_exceptions=True)
    assert (await topology.stream_state(stage.bus, "TASKS"))["first_seq"] == kept


async def test_orphans_and_timers_take_no_room_from_submissions(stage: Stage) -> None:
    s = stage.bus.subjects
    for n in range(5):
        await orphan(stage, f"o{n}")
        await schedule(
            stage.bus,
            s.later("scale", f"p{n}", "timer"),
            target=s.task("scale", "low", f"p{n}"),
            at=stage.bus.clock.now() + 99,
            message=hop(stage, f"p{n}"),
            msg_id=f"x{n}",
        )
    await stage.phase("sense", ClusterConfig(max_in_flight=5))
    task = ad(timeout_s=20)
    await stage.bus.jetstream.publish(s.intake("public", task.priority, task.task_id), submission(task))
    await stage.seen("task", phase="match", task_id=task.task_id)


async def test_hops_that_wait_for_a_phase_take_room_from_submissions(stage: Stage) -> None:
    for n in range(5):
        await put(stage.bus, hop(stage, f"t{n}"), "match")
    await stage.phase("sense", ClusterConfig(max_in_flight=5))
    task = ad(timeout_s=20, priority="critical")
    await stage.bus.jetstream.publish(
        stage.bus.subjects.intake("public", task.priority, task.task_id), submission(task)
    )
    await stage.gate_measured()
    assert stage.all("task", phase="match", task_id=task.task_id) == []
    await stage.bus.jetstream.api(f"STREAM.PURGE.{stage.bus.subjects.stream('TASKS')}", {})
    await stage.seen("task", phase="match", task_id=task.task_id)


async def test_the_doctor_counts_orphans(stage: Stage) -> None:
    assert await stuck(stage.bus, await topology.inspect(stage.bus, ClusterConfig())) == []
    await orphan(stage, "t1")
    [finding] = await stuck(stage.bus, await topology.inspect(stage.bus, ClusterConfig()))
    assert (finding.mark, finding.about) == ("warn", "orphans")
    assert f"1 messages stay in {stage.bus.subjects.stream('TASKS')}" in finding.message


async def test_a_phase_of_sense_sweeps(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "SWEEP_S", 0.02)
    await orphan(stage, "t1")
    await stage.phase("sense")
    await until(lambda: empty(stage), what="the orphan is removed")


async def empty(stage: Stage) -> bool:
    return await stage.pending("TASKS") == 0
