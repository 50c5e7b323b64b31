"""A message id that was taken: the message of an honest twin is left alone, and any other one costs only the id."""

import asyncio
from contextlib import AsyncExitStack
from hashlib import blake2b
from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import awarded, envelope, reward
from support.logs import capture_logs
from support.loop_harness import Phases, last, messages, put
from support.nodes import Counting, node
from support.phase_harness import Stage
from support.wait import until

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.hops.delivery import Delivery
from loom.bus.hops.duplicates import is_equivalent, store_once
from loom.bus.hops.hop_loop import schedule
from loom.bus.hops.outcomes import Later, Next, Outcome
from loom.bus.hops.schedules import SCHEDULE, TARGET
from loom.bus.natsio.ack_metadata import rfc3339
from loom.bus.natsio.stored_message import StoredMessage
from loom.bus.rewards import RewardBus
from loom.runner.services import running_nodes, running_phases
from loom.schemas.base import encode
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope
from loom.schemas.errors import AgentFailed
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.notices import ParentEnded, PlanTimeout, SubtaskEnded
from loom.schemas.run import RunRequest
from loom.schemas.task import RunResult, TaskAd, TaskError

NOW = 1_800_000_000.0
HOP = envelope(TaskAd(task_id="d", description="x"), now=NOW)


def kept(subject: str, message: Any, **headers: str) -> StoredMessage:
    return StoredMessage(subject, message if isinstance(message, bytes) else encode(message), headers, 7)


def taken(logs: list[Any]) -> list[Any]:
    return [entry for entry in logs if entry["event"] == "message_id_taken"]


# -- the owner of a message


@pytest.mark.parametrize(
    ("stored", "equivalent"),
    [
        (kept("s", HOP), True),
        (kept("s", replace(HOP, result=RunResult(content="a twin's own"), step=9, attempt=1)), True),
        (kept("elsewhere", HOP), False),
        (kept("s", replace(HOP, attempt=2)), False),
        (kept("s", replace(HOP, ad=replace(HOP.ad, task_id="other"))), False),
        (kept("s", SubtaskEnded(task_id="d", child_id="c", subtask="a")), False),
        (kept("s", PlanTimeout(envelope=HOP)), False),
        (kept("s", ParentEnded(task_id="d")), False),
        (kept("s", b"{}"), False),
        (kept("s", b"\xff"), False),
        (kept("s", HOP, **{SCHEDULE: "@at 2099-01-01T00:00:00Z", TARGET: "s"}), False),
    ],
)
def test_a_twins_message_has_the_same_subject_task_and_attempt(stored: StoredMessage, *, equivalent: bool) -> None:
    assert is_equivalent(stored, "s", HOP, {}, NOW) is equivalent


PHASE = "ns.task.match.normal.d"
LATER = "ns.later.match.d.task-2"


@pytest.mark.parametrize(
    ("under", "at", "target", "equivalent"),
    [
        (LATER, rfc3339(NOW + 10), PHASE, True),
        ("ns.later.match.d.task-1", rfc3339(NOW + 12), PHASE, True),
        (LATER, rfc3339(NOW - 10), PHASE, True),
        (LATER, rfc3339(NOW + 60), PHASE, False),
        (LATER, rfc3339(NOW + 10), "elsewhere", False),
        ("ns.later.match.other.task-2", rfc3339(NOW + 10), PHASE, False),
        (LATER, "never", PHASE, False),
        (PHASE, None, None, True),  # a twin that does not wait
        (LATER, None, None, False),  # nothing ever moves it
    ],
)
def test_a_twins_schedule_comes_out_at_the_same_place_and_not_much_later(
    under: str, at: str | None, target: str | None, *, equivalent: bool
) -> None:
    headers = {} if at is None else {SCHEDULE: f"@at {at}", TARGET: str(target)}
    wanted = {SCHEDULE: f"@at {rfc3339(NOW + 10)}", TARGET: PHASE}
    assert is_equivalent(kept(under, HOP, **headers), LATER, HOP, wanted, NOW) is equivalent


@pytest.mark.parametrize(("delay_s", "equivalent"), [(0.5, True), (30.0, False)])
def test_a_twin_that_waits_long_does_not_stand_for_one_that_does_not(delay_s: float, *, equivalent: bool) -> None:
    stored = kept(LATER, HOP, **{SCHEDULE: f"@at {rfc3339(NOW + delay_s)}", TARGET: PHASE})
    assert is_equivalent(stored, PHASE, HOP, {}, NOW) is equivalent


# -- honest twins


async def test_a_twin_that_is_still_stored_is_left_alone(bus: Bus) -> None:
    subject = bus.subjects.task("match", "normal", "d")
    with capture_logs() as logs:
        for step in range(3):
            await store_once(bus, subject, replace(HOP, step=step), msg_id="d:x")
    assert await messages(bus) == 1
    assert not taken(logs)


@pytest.mark.parametrize("facts", [{"state": "succeeded", "ended_at": NOW}, {"state": "cancelled", "ended_at": NOW}])
async def test_a_settled_twin_of_a_task_that_has_ended_is_not_sent_again(stage: Stage, facts: Any) -> None:
    await stage.record(HOP, **facts)
    await assert_settled_twin(stage.bus, again=0)


async def test_a_settled_twin_of_a_later_attempt_is_not_sent_again(stage: Stage) -> None:
    await stage.claimed(HOP, attempt=2)
    await assert_settled_twin(stage.bus, again=0)


@pytest.mark.parametrize("waits", [False, True])
async def test_a_settled_twin_whose_task_is_further_on_is_not_sent_again(stage: Stage, *, waits: bool) -> None:
    await stage.record(HOP)
    await settled_twin(stage.bus)
    if waits:
        target = stage.bus.subjects.task("match", "normal", "d")
        later = stage.bus.subjects.later("match", "d", "task-1")
        await schedule(stage.bus, later, target=target, at=stage.bus.clock.now() + 99, message=HOP, msg_id="d:y")
    else:
        await put(stage.bus, HOP, "execute")
    await store_once(stage.bus, stage.bus.subjects.task("match", "normal", "d"), HOP, msg_id="d:x")
    assert await messages(stage.bus) == 1


async def test_a_settled_twin_of_a_task_nothing_carries_any_more_is_sent_again(stage: Stage) -> None:
    await stage.record(HOP)
    await assert_settled_twin(stage.bus, again=1)


async def settled_twin(bus: Bus) -> None:
    """Take the id of a hop to MATCH by a message that is gone afterwards."""
    ack = await bus.jetstream.publish(bus.subjects.task("match", "normal", "d"), HOP, msg_id="d:x")
    await bus.jetstream.api(f"STREAM.MSG.DELETE.{ack.stream}", {"seq": ack.seq})


async def assert_settled_twin(bus: Bus, *, again: int) -> None:
    await settled_twin(bus)
    with capture_logs() as logs:
        await store_once(bus, bus.subjects.task("match", "normal", "d"), HOP, msg_id="d:x")
    assert await messages(bus) == again
    assert len(taken(logs)) == again


async def test_a_redelivered_message_makes_its_hop_once(bus: Bus, phases: Phases) -> None:
    handled = 0

    async def fail_once_after_the_hop(message: Envelope, delivery: Delivery) -> Outcome:
        nonlocal handled
        handled += 1
        if handled == 1:
            subject = bus.subjects.task("match", "normal", "d")
            await bus.jetstream.publish(subject, message, msg_id=f"d:{delivery.origin}")
            raise RuntimeError("this process died before its ack")
        return Next("match", message)

    with capture_logs() as logs:
        phase = await phases.start(bus, fail_once_after_the_hop)
        await put(bus, HOP)
        await phase.count(2)
        await until(lambda: not phase.running, what="it is settled")
    assert len(taken(logs)) == 0
    hops = await bus.jetstream.api(
        f"STREAM.INFO.{bus.subjects.stream('TASKS')}", {"subjects_filter": bus.subjects.task("match", "*", "*")}
    )
    assert hops["state"]["subjects"] == {bus.subjects.task("match", "normal", "d"): 1}


# -- ids that were taken by others


@pytest.mark.parametrize("where", ["later.match.x.y", "task.evaluate.low.zzz", "task.match.normal.d"])
@pytest.mark.parametrize("outcome", ["next", "later"])
async def test_a_hop_whose_id_was_taken_is_stored_all_the_same(
    bus: Bus, phases: Phases, where: str, outcome: str
) -> None:
    async def decide(message: Envelope, _delivery: Delivery) -> Outcome:
        return Next("match", message) if outcome == "next" else Later(0.05, message, "match")

    await bus.jetstream.publish(f"{bus.subjects.namespace}.{where}", b"{}", msg_id="d:task-2")
    await phases.start(bus, decide)
    assert await put(bus, HOP) == 2

    async def hop() -> Any:
        found = await last(bus, "TASKS", bus.subjects.task("match", "normal", "d"))
        return found if found is not None and found.data != b"{}" else None

    found = await until(hop, what="the hop")
    assert found.envelope.task_id == "d"


async def test_a_taken_id_whose_message_is_gone_loses_no_hop(bus: Bus, phases: Phases) -> None:
    async def decide(message: Envelope, _delivery: Delivery) -> Outcome:
        return Next("match", message)

    ack = await bus.jetstream.publish(bus.subjects.later("match", "x", "y"), b"{}", msg_id="d:task-2")
    await bus.jetstream.api(f"STREAM.MSG.DELETE.{ack.stream}", {"seq": ack.seq})
    await phases.start(bus, decide)
    assert await put(bus, HOP) == 2
    await until(lambda: last(bus, "TASKS", bus.subjects.task("match", "normal", "d")), what="the hop")


async def test_a_reward_whose_id_was_taken_is_learned_all_the_same(stage: Stage) -> None:
    await stage.phase("adapt")
    earned = reward(1)
    digest = blake2b(repr(float(earned.score)).encode(), digest_size=4).hexdigest()
    await stage.bus.jetstream.publish(
        stage.bus.subjects.of("reward", "rules", "local", "x", "y"), b"{}", msg_id=f"{earned.reward_id}:{digest}"
    )

    for _ in range(2):  # the same twice counts once
        await RewardBus(bus=stage.bus).publish(earned)

    async def known() -> NodeProfile | None:
        entry = await stage.bus.bucket("nodes", NodeProfile).get(earned.node_key)
        return entry.value if entry else None

    assert (await until(known, what="the reward is learned")).total_tasks == 1


async def test_a_result_whose_id_was_taken_ends_its_task(stage: Stage) -> None:
    await stage.phase("evaluate")
    hop = awarded(envelope(TaskAd(task_id="d", description="x"), now=stage.bus.clock.now()))
    await stage.claimed(hop, attempt=1)
    subject = stage.bus.subjects.task("evaluate", "normal", "d")
    await stage.bus.jetstream.publish(stage.bus.subjects.later("match", "x", "y"), b"{}", msg_id="d:task-9")
    await store_once(stage.bus, subject, replace(hop, result=RunResult(content="42")), msg_id="d:task-9")
    await until(lambda: ended(stage), what="the task has ended")
    assert (await stage.read("d")).state == "succeeded"


async def test_a_cancel_whose_id_was_taken_is_announced(stage: Stage) -> None:
    await stage.phase("sense")
    await stage.phase("evaluate")
    hop = envelope(TaskAd(task_id="d", description="x"), now=stage.bus.clock.now())
    await stage.record(hop)
    await stage.bus.jetstream.publish(stage.bus.subjects.later("match", "x", "y"), b"{}", msg_id="d:cancel")
    await task_client.cancel(stage.bus, "d")
    assert (await stage.seen("result", task_id="d")).state == "cancelled"


async def ended(stage: Stage) -> bool:
    return (await stage.read("d")).ended


@pytest.mark.slow
@pytest.mark.parametrize("where", ["later.match.x.y", "task.evaluate.low.zzz"])
async def test_a_task_whose_every_id_was_taken_ends_in_time(nats_url: str, namespace: str, where: str) -> None:
    agent = FailsOnce()
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(Bus(nats_url, namespace=namespace))
        await stack.enter_async_context(
            running_phases(nats_url, namespace=namespace, config=ClusterConfig(mitosis_threshold=1.0))
        )
        hosted = [node("n1", agent, code=0.9), node("n2", agent, code=0.9)]
        await stack.enter_async_context(running_nodes(nats_url, lambda: hosted, namespace=namespace))
        ids = [f"d:intake-{n}" for n in range(1, 4)] + [f"d:task-{n}" for n in range(1, 160)] + ["d:attempt-2"]
        await asyncio.gather(*(bus.jetstream.publish(f"{namespace}.{where}", b"{}", msg_id=one) for one in ids))
        ad = TaskAd(task_id="d", domain="code", description="add two numbers", timeout_s=15)
        result = await (await task_client.publish(bus, ad, deltas=False)).result(20)
        record = await task_client.status(bus, "d")

    assert result.success, result.error
    assert result.attempts == 2
    assert record.state == "succeeded"
    assert agent.runs["d"] == 2


class FailsOnce(Counting):
    """An agent whose first run of each task fails."""

    async def __call__(self, job: RunRequest) -> str:
        done = await super().__call__(job)
        if self.runs[job.task_id] == 1:
            raise AgentFailed("the first run fails")
        return done


@pytest.mark.slow
async def test_a_divided_task_whose_ids_were_taken_ends_with_its_parts(nats_url: str, namespace: str) -> None:
    from loom.phases.scale.subtask_graph import child_id  # noqa: PLC0415 - the ids an attacker computes

    agent = Counting()
    plan = [{"id": name, "description": name, "domain": "code"} for name in ("a", "b")]
    plan[1]["dependencies"] = ["a"]  # type: ignore[assignment]
    children = [child_id("p", name) for name in ("a", "b")]
    ids = ["p:timer-1", "p:join-1", "p:unpark", "p:planfail-1"]
    ids += [f"{child}:{what}" for child in children for what in ("begin", "done")]
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(Bus(nats_url, namespace=namespace))
        await stack.enter_async_context(running_phases(nats_url, namespace=namespace))
        await stack.enter_async_context(
            running_nodes(nats_url, lambda: [node("n1", agent, code=0.9)], namespace=namespace)
        )
        await asyncio.gather(
            *(bus.jetstream.publish(bus.subjects.later("match", "x", "y"), b"{}", msg_id=one) for one in ids)
        )
        ad = TaskAd(task_id="p", domain="code", description="all", context={"plan": plan}, timeout_s=15)
        result = await (await task_client.publish(bus, ad, deltas=False)).result(20)

    assert result.success, result.error
    assert agent.runs == {"p": 1, **dict.fromkeys(children, 1)}


@pytest.mark.parametrize(
    ("stored", "equivalent"),
    [
        (PlanTimeout(envelope=HOP), True),
        (PlanTimeout(envelope=replace(HOP, step=9)), True),
        (PlanTimeout(envelope=replace(HOP, attempt=2)), False),
        (HOP, False),
        (SubtaskEnded(task_id="d", child_id="c", subtask="a"), False),
    ],
)
def test_a_stored_plan_timeout_counts_as_sent_for_the_same_attempt(stored: Any, *, equivalent: bool) -> None:
    assert is_equivalent(kept("s", stored), "s", PlanTimeout(envelope=HOP), {}, NOW) is equivalent


@pytest.mark.parametrize("other", [SubtaskEnded(task_id="d", child_id="x", subtask="a"), ParentEnded(task_id="d"), HOP])
def test_a_stored_notice_counts_as_sent_when_it_is_the_same(other: Any) -> None:
    notice = SubtaskEnded(task_id="d", child_id="c", subtask="a")
    assert is_equivalent(kept("s", notice), "s", notice, {}, NOW)
    assert not is_equivalent(kept("s", other), "s", notice, {}, NOW)


def test_a_stored_error_to_evaluate_counts_as_sent_too() -> None:
    failed = HOP.failed(TaskError(code="node_lost", message="x"))
    assert is_equivalent(kept("s", HOP), "s", failed, {}, NOW)
