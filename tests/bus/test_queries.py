"""Queries of the past: the newest messages of a stream, those since a time, and a task in any stream."""

import pytest
from support.bus_helpers import envelope

from loom.bus import queries
from loom.bus.bus import Bus
from loom.bus.hops.hop_loop import schedule
from loom.bus.queries import ended_since, find_task, latest, recent_records, rewards_since
from loom.bus.records import records
from loom.bus.rewards import RewardBus
from loom.runner.cli.common import resolve_task
from loom.schemas.auction import Award
from loom.schemas.errors import InvalidTask, UnknownTask
from loom.schemas.learning.judgement import judgement
from loom.schemas.learning.reward import Reward
from loom.schemas.notices import PlanTimeout, SubtaskEnded
from loom.schemas.record import TaskRecord
from loom.schemas.task import Submission, TaskAd, TaskState


def reward(n: int, node_id: str = "n1") -> Reward:
    return Reward(
        reward_id=f"t{n}:1:rules",
        task_id=f"t{n}",
        attempt=1,
        node_id=node_id,
        domain_token="code",
        score=1.0,
        ended_at=1.0 * n,
    )


def record(task_id: str, state: TaskState = "running", *, at: float = 1.0, ended_at: float | None = None) -> TaskRecord:
    return TaskRecord(
        task_id=task_id, state=state, envelope=envelope(task_id), admitted_at=at, ended_at=ended_at, submission="s"
    )


async def test_the_newest_are_found_however_far_back_they_are(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "FIRST_SPAN", 4)
    rewards = RewardBus(bus=bus)
    for n in range(30):
        await rewards.publish(reward(n, "rare" if n in {1, 25} else "n1"))
    stream = bus.subjects.stream("REWARDS")

    async def seqs(node_id: str, limit: int) -> list[int]:
        found = await latest(bus, stream, bus.subjects.of("reward", "rules", "local", node_id, "*"), limit)
        assert found.last_seq == 30
        return [message.seq for message in found.messages]

    assert await seqs("*", 2) == [29, 30]
    assert await seqs("*", 0) == []
    assert await seqs("rare", 1) == [26]
    assert await seqs("rare", 5) == [2, 26]
    assert await seqs("unknown", 5) == []


async def test_an_empty_stream_has_no_past(bus: Bus) -> None:
    assert (
        await latest(bus, bus.subjects.stream("REWARDS"), bus.subjects.of("reward", "*", "*", "*", "*"), 5)
    ).messages == []
    assert await recent_records(bus, 5) == []
    assert [one async for one in ended_since(bus, 0.0)] == []


async def test_records_come_by_admission_and_once(bus: Bus) -> None:
    bucket = records(bus)
    revision = await bucket.create("old", record("old", at=1.0))
    await bucket.create("new", record("new", at=2.0))
    await bucket.update("old", record("old", "failed", at=1.0, ended_at=5.0), revision)

    assert [one.task_id for one in await recent_records(bus, 5)] == ["new", "old"]
    assert [one.task_id for one in await recent_records(bus, 5, lambda one: one.ended)] == ["old"]
    assert [one.task_id for one in await recent_records(bus, 1)] == ["old"]  # the record changed last


async def test_a_query_since_a_time_has_the_ends_and_rewards_from_it_on(bus: Bus) -> None:
    bucket, rewards = records(bus), RewardBus(bus=bus)
    await rewards.publish(reward(1))
    await bucket.create("early", record("early", "succeeded", ended_at=bus.clock.now()))
    stored = await latest(bus, bus.subjects.stream("REWARDS"), bus.subjects.of("reward", "*", "*", "*", "*"), 1)
    moment = stored.messages[0].stored_at + 0.000_001
    middle = bus.clock.now()
    await rewards.publish(reward(2))
    await bucket.create("late", record("late", "failed", ended_at=bus.clock.now()))
    await bucket.create("running", record("running"))

    assert [one.task_id async for _, one in rewards_since(bus, moment)] == ["t2"]
    assert [one.task_id async for _, one in rewards_since(bus, 0.0, domain_token="data")] == []
    assert [one.task_id async for one in ended_since(bus, 1.0)] == ["early", "late"]
    assert [one.task_id async for one in ended_since(bus, middle)] == ["late"]


async def test_a_task_is_found_wherever_it_is(bus: Bus) -> None:
    bucket = records(bus)
    queued = Submission(ad=TaskAd(task_id="queued", description="x"), submission="s")
    await bus.jetstream.publish(bus.subjects.intake("public", "normal", "queued"), queued)
    for task_id in ("hopping", "waiting", "between", "divided", "parked"):
        await bucket.create(task_id, record(task_id))
    await bus.jetstream.publish(bus.subjects.task("match", "normal", "hopping"), envelope("hopping", attempt=3))
    notice = SubtaskEnded(task_id="divided", child_id="c", subtask="a")
    await bus.jetstream.publish(bus.subjects.task("scale", "normal", "divided"), notice)
    await schedule(
        bus,
        bus.subjects.later("scale", "parked", "timer"),
        target=bus.subjects.task("scale", "normal", "parked"),
        at=bus.clock.now() + 600,
        message=PlanTimeout(envelope=envelope("parked", attempt=4)),
        msg_id="parked:timer",
    )
    await schedule(
        bus,
        bus.subjects.later("match", "waiting", "task-1"),
        target=bus.subjects.task("match", "normal", "waiting"),
        at=bus.clock.now() + 600,
        message=envelope("waiting", attempt=2),
        msg_id="w",
    )
    await bucket.create("ended", record("ended", "failed", ended_at=1.0))

    assert (await find_task(bus, "queued")).submission == queued
    found = {
        task_id: await find_task(bus, task_id)
        for task_id in ("hopping", "waiting", "between", "divided", "parked", "ended")
    }
    assert {task_id: (one.phase, one.record and one.record.envelope.attempt) for task_id, one in found.items()} == {
        "hopping": ("match", 3),
        "waiting": ("later", 2),
        "between": ("", 1),
        "divided": ("", 1),
        "parked": ("later", 4),
        "ended": ("", 1),
    }


async def test_eight_digits_stand_for_one_recent_id_only(bus: Bus) -> None:
    bucket = records(bus)
    for task_id in ("0123456789", "abcdefgh-1", "abcdefgh-2"):
        await bucket.create(task_id, record(task_id))

    found = await resolve_task(bus, "01234567")
    assert found.record is not None
    assert found.record.task_id == "0123456789"
    for unknown in ("0123456", "abcdefgh", "89012345"):
        with pytest.raises(UnknownTask):
            await resolve_task(bus, unknown)
    with pytest.raises(InvalidTask):
        await resolve_task(bus, "a.b")


def test_only_tasks_that_a_node_has_finished_can_be_judged() -> None:
    done = TaskRecord(
        task_id="t1",
        state="succeeded",
        envelope=envelope("t1", award=Award(node_id="n1", host_id="h"), attempt=2),
        admitted_at=1.0,
        ended_at=2.0,
    )

    given = judgement(done, 0.5, "r" * 600)
    assert (given.reward_id, given.node_id, given.ended_at, len(given.reason)) == ("t1:2:person", "n1", 2.0, 500)
    for bad in (record("t1"), record("t1", "cancelled", ended_at=1.0)):
        with pytest.raises(InvalidTask, match="node has finished"):
            judgement(bad, 0.5, "")
    for score in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidTask, match="from 0 to 1"):
            judgement(done, score, "")
