"""The hop loop: the effect of each decision, and of a message without one."""

import asyncio
import time
from typing import Any

import pytest
import structlog
from msgspec.structs import replace
from support.bus_helpers import Connect, back, envelope
from support.logs import capture_logs
from support.loop_harness import (
    Phases,
    arrived,
    deliver_in_vain,
    hop,
    lane,
    last,
    messages,
    put,
    record_answers,
    settled,
    turns,
)
from support.wait import until

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.hops import hop_loop as loop_module
from loom.bus.hops.delivery import DEAD_AFTER, Delivery
from loom.bus.hops.hop_loop import HopLoop, Service, lane_slots, retry_s
from loom.bus.hops.outcomes import Done, Fail, Later, Leave, Next, Outcome
from loom.bus.topology import INTAKE_LANES, MATCH_LANES, SCALE_LANE
from loom.runner.server.nats_server import NatsServer
from loom.schemas.base import new_id
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope
from loom.schemas.errors import BusUnavailable, Overloaded
from loom.schemas.task import RunResult, TaskAd, TaskError


async def to_execute(env: Envelope, _: Delivery) -> Outcome:
    return Next("execute", env)


class Held:
    """A handler that keeps its messages until a test lets it go on."""

    def __init__(self, outcome: Outcome | None = None) -> None:
        self.go_on = asyncio.Event()
        self._outcome = outcome or Done()

    async def __call__(self, _message: Any, _delivery: Delivery) -> Outcome:
        await self.go_on.wait()
        return self._outcome


@pytest.fixture
async def hasty(plain: Bus, monkeypatch: pytest.MonkeyPatch) -> Bus:
    """A bus whose server gives an unanswered message to another after half a second."""
    real = topology.consumer
    monkeypatch.setattr(topology, "consumer", lambda bus, lane: {**real(bus, lane), "ack_wait": 500_000_000})
    await topology.apply(plain, ClusterConfig())
    return plain


# -- decisions


async def test_the_next_decision_goes_to_the_phase_with_one_more_step_and_a_hop(bus: Bus, phases: Phases) -> None:
    before = bus.clock.now()
    phase = await phases.start(bus, to_execute)
    await put(bus, envelope(step=4, trace="00-ab-cd-01"))

    kept = await hop(bus, "execute")

    assert kept.subject == bus.subjects.task("execute", "normal", "t1")
    assert kept.headers["Nats-Msg-Id"] == "t1:task-1"
    (made,) = kept.envelope.hops
    assert (made.phase, made.instance, made.step) == ("scale", bus.instance, 4)
    assert before - 1 <= made.started <= made.finished <= bus.clock.now() + 1
    assert kept.envelope == replace(phase.handled[0][0], step=5, hops=(made,))
    await settled(bus, 1)


async def test_twins_on_paths_of_different_length_do_not_swallow_each_others_hops(bus: Bus, phases: Phases) -> None:
    async def wait_or_go(env: Envelope, _: Delivery) -> Outcome:
        return Next("execute", env) if env.attempt == 1 else Later(60, env)

    await phases.start(bus, wait_or_go)
    for attempt, failures in ((1, 0), (1, 1), (2, 0), (2, 1)):
        twin = envelope(attempt=attempt, failures=failures)
        await bus.jetstream.publish(bus.subjects.task("scale", "normal", "t1"), twin, msg_id=new_id())

    async def all_kept() -> bool:
        state = await topology.stream_state(bus, "TASKS", subjects=bus.subjects.everything)
        found = [subject.split(".")[1:3] for subject, count in state["subjects"].items() for _ in range(count)]
        return sorted(found) == [["later", "scale"], ["later", "scale"], ["task", "execute"], ["task", "execute"]]

    await until(all_kept, what="two hops to execute and two timers")


async def test_a_hop_keeps_its_priority(bus: Bus, phases: Phases) -> None:
    await phases.start(bus, to_execute)
    urgent = envelope()
    await put(bus, replace(urgent, ad=replace(urgent.ad, priority="critical")))
    assert (await hop(bus, "execute")).subject == bus.subjects.task("execute", "critical", "t1")


async def test_a_message_that_follows_from_state_is_named_after_it(bus: Bus, phases: Phases) -> None:
    async def join(env: Envelope, _: Delivery) -> Outcome:
        return Next("execute", env, msg_id=f"{env.task_id}:join")

    await phases.start(bus, join)
    await put(bus, envelope())
    assert (await hop(bus, "execute")).headers["Nats-Msg-Id"] == "t1:join"


async def test_the_fail_decision_goes_to_evaluate_with_the_error_and_no_result(bus: Bus, phases: Phases) -> None:
    error = TaskError(code="no_bids", message="no node")

    async def fail(env: Envelope, _: Delivery) -> Outcome:
        return Fail(error, env)

    await phases.start(bus, fail)
    await put(bus, envelope(result=RunResult(content="half")))
    kept = await hop(bus, "evaluate")
    assert (kept.envelope.error, kept.envelope.result, kept.envelope.step) == (error, None, 1)
    assert [made.phase for made in kept.envelope.hops] == ["scale"]
    assert kept.headers["Nats-Msg-Id"] == "t1:task-1"
    await settled(bus, 1)


async def test_the_done_decision_leaves_nothing(bus: Bus, phases: Phases) -> None:
    phase = await phases.start(bus)
    await put(bus, envelope())
    await phase.count(1)
    await settled(bus, 0)
    assert (await lane(bus))["num_ack_pending"] == 0


async def test_the_later_decision_comes_back_after_its_delay_and_holds_no_slot_meanwhile(
    bus: Bus, phases: Phases
) -> None:
    async def wait_once(env: Envelope, _: Delivery) -> Outcome:
        return Later(0.4, env) if env.task_id == "t1" and env.step == 0 else Done()

    phase = await phases.start(bus, wait_once, lanes=[(SCALE_LANE, 1)])
    started = time.monotonic()
    await put(bus, envelope("t1"))
    kept = await arrived(bus, "TASKS", bus.subjects.later("scale", "t1", "task-1"))
    assert kept.headers["Nats-Schedule-Target"] == bus.subjects.task("scale", "normal", "t1")
    assert kept.headers["Nats-Msg-Id"] == "t1:task-1"
    await put(bus, envelope("t2"))
    await phase.count(3)

    assert phase.tasks == ["t1", "t2", "t1"]
    assert time.monotonic() - started >= 0.3
    again = phase.handled[-1][0]
    assert again.step == 1
    assert [made.phase for made in again.hops] == ["scale"]
    assert phase.handled[-1][1].facts.delivered == 1  # a fresh count
    await settled(bus, 0)


@pytest.mark.slow
async def test_a_repeated_later_decision_extends_its_hop(bus: Bus, phases: Phases) -> None:
    async def wait_thrice(env: Envelope, _: Delivery) -> Outcome:
        return Later(0.05, env) if env.step < 3 else Next("execute", env)

    await phases.start(bus, wait_thrice)
    await put(bus, envelope())
    kept = await hop(bus, "execute")
    (made,) = kept.envelope.hops
    assert (kept.envelope.step, made.step) == (4, 3)
    assert made.finished - made.started >= 0.1


@pytest.mark.slow
async def test_the_leave_decision_settles_nothing_but_frees_the_slot(hasty: Bus, phases: Phases) -> None:
    async def leave_first(env: Envelope, delivery: Delivery) -> Outcome:
        return Leave() if env.task_id == "t1" and delivery.facts.delivered == 1 else Done()

    phase = await phases.start(hasty, leave_first, lanes=[(SCALE_LANE, 1)])
    answers = record_answers(hasty)
    await put(hasty, envelope("t1"))
    await phase.count(1)
    assert answers == []
    await put(hasty, envelope("t2"))
    await phase.count(3)
    assert phase.tasks == ["t1", "t2", "t1"]
    await settled(hasty, 0)


async def test_the_handlers_logs_name_the_task_and_the_phase(bus: Bus, phases: Phases) -> None:
    bound: list[dict[str, Any]] = []

    async def look(_env: Envelope, _delivery: Delivery) -> Outcome:
        bound.append(structlog.contextvars.get_contextvars())
        return Done()

    phase = await phases.start(bus, look)
    await put(bus, envelope())
    await phase.count(1)
    assert bound == [{"task_id": "t1", "phase": "scale"}]


async def test_a_service_may_take_another_shape(bus: Bus, phases: Phases) -> None:
    phase = await phases.start(bus, phase="sense", lanes=[(INTAKE_LANES[0], 2)], shape=TaskAd)
    await bus.jetstream.publish(bus.subjects.intake("public", "low", "t1"), TaskAd(task_id="t1", description="x"))
    await phase.count(1)
    assert phase.handled[0][0] == TaskAd(task_id="t1", description="x")


# -- failures


async def test_an_exception_brings_the_message_back_later_each_time(
    bus: Bus, phases: Phases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "retry_s", lambda delivered: retry_s(delivered) / 10)
    at: list[float] = []

    async def stumble(env: Envelope, _: Delivery) -> Outcome:
        at.append(time.monotonic())
        if len(at) < 4:
            raise RuntimeError("a bug")
        return Next("execute", env)

    answers = record_answers(bus)
    phase = await phases.start(bus, stumble)
    with capture_logs() as logs:
        await put(bus, envelope())
        assert (await hop(bus, "execute")).envelope.step == 1
    assert [delivery.facts.delivered for _, delivery in phase.handled] == [1, 2, 3, 4]
    waits = [entry["retry_in_s"] for entry in logs if entry["event"] == "hop_failed"]
    assert [0.025 <= waits[0] <= 0.05, 0.05 <= waits[1] <= 0.1, 0.1 <= waits[2] <= 0.2] == [True] * 3
    assert all(later - earlier >= wait - 0.02 for earlier, later, wait in zip(at, at[1:], waits, strict=False))
    await until(lambda: len(answers) == 4, what="the last answer")
    assert [answer[:4] for answer in answers] == [b"-NAK", b"-NAK", b"-NAK", b"+ACK"]
    assert all("a bug" in entry["error"] for entry in logs if entry["event"] == "hop_failed")


def test_the_wait_doubles_up_to_half_a_minute_and_never_overflows() -> None:
    assert [retry_s(n) for n in (1, 2, 3, 6, 7, 10)] == [0.5, 1, 2, 16, 30, 30]
    assert retry_s(10**6) == 30


@pytest.mark.slow
async def test_a_next_hop_that_cannot_be_stored_brings_the_message_back(
    bus: Bus, phases: Phases, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = bus.jetstream.publish, list[str]()

    async def refuse_once(subject: str, message: Any, **options: Any) -> Any:
        if not refused:
            refused.append(subject)
            raise BusUnavailable("not now")
        return await real(subject, message, **options)

    phase = await phases.start(bus, to_execute)
    await put(bus, envelope())
    monkeypatch.setattr(bus.jetstream, "publish", refuse_once)
    await hop(bus, "execute")
    assert phase.tasks == ["t1", "t1"]
    await settled(bus, 1)


async def test_a_message_in_hand_does_not_age_while_the_server_is_full(
    bus: Bus, phases: Phases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "FULL_S", 0.01)
    real, refused = bus.jetstream.publish, list[str]()

    async def full(subject: str, message: Any, **options: Any) -> Any:
        if len(refused) < 2 * DEAD_AFTER:
            refused.append(subject)
            raise Overloaded("the bus is full")
        return await real(subject, message, **options)

    phase = await phases.start(bus, to_execute)
    monkeypatch.setattr(bus.jetstream, "publish", full)
    await real(bus.subjects.task("scale", "normal", "t1"), envelope())
    await hop(bus, "execute")
    assert {delivery.facts.delivered for _, delivery in phase.handled} == {1}
    await settled(bus, 1)


@pytest.mark.slow
async def test_a_redelivered_input_makes_the_same_hop_once(hasty: Bus, phases: Phases) -> None:
    lost = record_answers(hasty, lose=lambda answer: answer == b"+ACK" and lost.count(b"+ACK") == 1)
    phase = await phases.start(hasty, to_execute)
    await put(hasty, envelope())
    await phase.count(2)
    await settled(hasty, 1)
    assert phase.tasks == ["t1", "t1"]
    kept = await hop(hasty, "execute")
    assert (kept.headers["Nats-Msg-Id"], kept.seq) == ("t1:task-1", 2)  # right behind the input: nothing came between


@pytest.mark.slow
async def test_a_message_of_a_lost_loop_is_handled_by_another(hasty: Bus, connect: Connect, phases: Phases) -> None:
    mine = await phases.start(await connect(), Held())
    await put(hasty, envelope())
    await mine.count(1)
    mine.bus.abort()
    other = await phases.start(hasty)
    await other.count(1)
    await settled(hasty, 0)


# -- bounds


async def test_no_more_are_handled_at_once_than_there_are_slots(bus: Bus, phases: Phases) -> None:
    for n in range(12):
        await put(bus, envelope(f"t{n}"))
    held = Held()
    phase = await phases.start(bus, held, lanes=[(SCALE_LANE, 3)])
    await phase.count(3)
    await bus.requests.flush()
    assert len(phase.running) == 3
    held.go_on.set()
    await phase.count(12)
    await settled(bus, 0)
    assert phase.most == 3
    assert sorted(phase.tasks) == sorted(f"t{n}" for n in range(12))


async def test_no_more_are_handled_than_there_are_slots_even_after_a_reconnect(bus: Bus, phases: Phases) -> None:
    held = Held()
    phase = await phases.start(bus, held, lanes=[(SCALE_LANE, 3)])
    await until(lambda: phase.loop._consumers[0].pending == 3, what="the request")
    reconnected = asyncio.Event()
    bus.connection.on_reconnect(reconnected.set)
    await bus.connection._nc.force_reconnect()
    await asyncio.wait_for(reconnected.wait(), 5)
    for n in range(12):
        await put(bus, envelope(f"t{n}"))
    await phase.count(3)
    held.go_on.set()
    await phase.count(12)
    assert phase.most == 3


async def test_one_lane_full_of_work_does_not_hold_up_another(bus: Bus, phases: Phases) -> None:
    low, *_, critical = MATCH_LANES
    for n in range(4):
        await put_at(bus, "low", f"low{n}")
    held = Held()
    phase = await phases.start(bus, held, phase="match", lanes=[(low, 2), (critical, 1)])
    await phase.count(2)
    await put_at(bus, "critical", "urgent")
    await phase.count(3)
    assert phase.tasks[-1] == "urgent"
    held.go_on.set()
    await phase.count(5)


async def put_at(bus: Bus, priority: Any, task_id: str) -> None:
    env = envelope(task_id)
    await put(bus, replace(env, ad=replace(env.ad, priority=priority)), "match")


async def test_a_window_of_the_services_own_holds_messages_back_until_topped_up(bus: Bus, phases: Phases) -> None:
    room = 0
    phase = await phases.start(bus, window=lambda _lane, _slots: room)
    await put(bus, envelope())
    await bus.requests.flush()
    assert phase.handled == []
    room = 1
    phase.loop.top_up()
    await phase.count(1)


def test_a_fifth_of_the_slots_is_kept_for_urgent_tasks() -> None:
    slots = {lane.name: lane_slots(lane, 100) for lane in MATCH_LANES}
    assert slots == {"match_low": 20, "match_normal": 60, "match_high": 10, "match_critical": 10}


# -- suspects


async def test_a_message_delivered_more_than_three_times_is_handled_alone(bus: Bus, phases: Phases) -> None:
    await put(bus, envelope("poison"))
    await deliver_in_vain(bus, 3)
    for n in range(5):
        await put(bus, envelope(f"t{n}"))
    others: dict[str, list[str]] = {}

    async def look(env: Envelope, _: Delivery) -> Outcome:
        await turns()
        others[env.task_id] = [name for name in phase.running if name != env.task_id]
        await bus.requests.flush()
        return Done()

    phase = await phases.start(bus, look, lanes=[(SCALE_LANE, 8)])
    await phase.count(6)
    await settled(bus, 0)
    assert others.pop("poison") == []
    assert any(others.values())  # some ran at the same time


async def test_a_message_delivered_three_times_is_not_yet_suspect(bus: Bus, phases: Phases) -> None:
    await put(bus, envelope("t0"))
    await deliver_in_vain(bus, 2)
    await put(bus, envelope("t1"))
    held = Held()
    phase = await phases.start(bus, held)
    await phase.count(2)
    assert sorted(phase.running) == ["t0", "t1"]
    held.go_on.set()


async def test_a_suspect_that_has_shown_to_be_harmless_lets_the_others_in(bus: Bus, phases: Phases) -> None:
    await put(bus, envelope("poison"))
    await deliver_in_vain(bus, 3)
    shown, held = asyncio.Event(), Held()

    async def show(env: Envelope, delivery: Delivery) -> Outcome:
        if env.task_id == "poison":
            await shown.wait()
            delivery.release()
        return await held(env, delivery)

    phase = await phases.start(bus, show)
    await phase.count(1)
    await put(bus, envelope("t1"))
    await bus.requests.flush()
    await turns()
    assert phase.running == ["poison"]
    shown.set()
    await phase.count(2)
    assert phase.running == ["poison", "t1"]
    held.go_on.set()
    await settled(bus, 0)


# -- long work


@pytest.mark.slow
async def test_long_work_is_not_delivered_to_another_replica(
    hasty: Bus, phases: Phases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "IN_PROGRESS_S", 0.1)
    answers, held = record_answers(hasty), Held()
    phase = await phases.start(hasty, held)
    started = time.monotonic()
    await put(hasty, envelope())
    await until(lambda: answers.count(b"+WPI") >= 15, what="more than twice the server's patience")
    assert time.monotonic() - started > 1.0
    assert phase.tasks == ["t1"]
    assert (await lane(hasty))["num_redelivered"] == 0
    held.go_on.set()
    await settled(hasty, 0)


@pytest.mark.slow
async def test_long_work_without_a_progress_ack_is_delivered_to_another_replica(hasty: Bus, phases: Phases) -> None:
    held = Held()
    phase = await phases.start(hasty, held)
    await put(hasty, envelope())
    await phase.count(2)
    held.go_on.set()


@pytest.mark.slow
async def test_messages_that_wait_for_their_turn_get_progress_acks_too(
    hasty: Bus, phases: Phases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "IN_PROGRESS_S", 0.1)
    await hasty.isolation.acquire(exclusive=True)
    answers = record_answers(hasty)
    phase = await phases.start(hasty)
    await put(hasty, envelope())
    await until(lambda: answers.count(b"+WPI") >= 8, what="several signs of progress")
    assert phase.handled == []
    hasty.isolation.release(exclusive=True)
    await settled(hasty, 0)
    assert phase.tasks == ["t1"]


# -- stopping


async def test_a_drain_finishes_the_messages_in_hand_and_takes_no_new_one(bus: Bus, phases: Phases) -> None:
    held = Held()
    phase = await phases.start(bus, held)
    await put(bus, envelope("t1"))
    await phase.count(1)
    draining = asyncio.ensure_future(phase.loop.drain(10))
    await until(lambda: not phase.loop._consumers, what="the drain has begun")
    await put(bus, envelope("t2"))
    await bus.requests.flush()
    held.go_on.set()
    await draining
    assert phase.tasks == ["t1"]
    await settled(bus, 1)
    assert (await lane(bus))["num_ack_pending"] == 0


async def test_work_past_the_drain_time_is_recalled_and_may_still_be_passed_on(bus: Bus, phases: Phases) -> None:
    async def give_back(env: Envelope, delivery: Delivery) -> Outcome:
        await delivery.recalled.wait()
        return Next("scale", env)

    phase = await phases.start(bus, give_back)
    await put(bus, envelope())
    await phase.count(1)
    await phase.loop.drain(0.05)
    kept = await hop(bus, "scale")
    assert kept.envelope.step == 1
    await settled(bus, 1)


async def test_work_that_does_not_end_when_recalled_is_cancelled_and_delivered_to_another(
    bus: Bus, connect: Connect, phases: Phases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "RECALL_S", 0.05)
    stubborn = await phases.start(bus, Held())
    await put(bus, envelope())
    await stubborn.count(1)
    other = await phases.start(await connect())
    await stubborn.loop.drain(0.05)
    assert stubborn.running == []
    await other.count(1)  # at once, not after half a minute
    assert other.handled[0][1].facts.delivered == 2
    await settled(bus, 0)


async def test_a_message_that_waits_for_its_turn_is_given_back_too(
    bus: Bus, connect: Connect, phases: Phases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "RECALL_S", 0.05)
    await bus.isolation.acquire(exclusive=True)
    phase = await phases.start(bus)
    await put(bus, envelope())
    await until(lambda: phase.loop._deliveries, what="the message is here")
    await phase.loop.drain(0)
    assert phase.handled == []
    other = await phases.start(await connect())
    await other.count(1)
    bus.isolation.release(exclusive=True)
    async with asyncio.timeout(1):
        await bus.isolation.acquire(exclusive=True)  # the gate is free


async def test_a_drain_may_be_repeated_and_need_not_be_preceded_by_a_start(bus: Bus, phases: Phases) -> None:
    async def handle(_message: Envelope, _delivery: Delivery) -> Outcome:
        return Done()

    never_started = HopLoop(bus, Service("scale", [(SCALE_LANE, 1)], Envelope, handle))
    await never_started.drain(0)
    phase = await phases.start(bus)
    before = len(bus.connection._nc._subs)
    await phase.loop.drain(0)
    await phase.loop.drain(0)
    assert len(bus.connection._nc._subs) == before - 1


# -- faults


async def test_a_loop_goes_on_after_the_server_was_killed(mortal: Bus, server: NatsServer, phases: Phases) -> None:
    held = Held()
    phase = await phases.start(mortal, held, lanes=[(SCALE_LANE, 2)])
    for n in range(4):
        await put(mortal, envelope(f"t{n}"))
    await phase.count(2)
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.restart)
    await back(mortal)
    held.go_on.set()
    await put(mortal, envelope("t9"))
    await phase.count(5)
    assert {"t0", "t1", "t2", "t3", "t9"} <= set(phase.tasks)
    assert phase.most == 2
    await settled(mortal, 0)


async def test_a_consumer_deleted_under_the_loop_is_restored_with_its_settings(bus: Bus, phases: Phases) -> None:
    phase = await phases.start(bus)
    before = (await lane(bus))["config"]
    await bus.jetstream.api(f"CONSUMER.DELETE.{bus.subjects.stream('TASKS')}.scale")
    await put(bus, envelope())
    await phase.count(1)
    assert (await lane(bus))["config"] == before


async def test_two_loops_share_the_work(bus: Bus, connect: Connect, phases: Phases) -> None:
    one, other = await phases.start(bus, to_execute), await phases.start(await connect(), to_execute)
    for n in range(40):
        await put(bus, envelope(f"t{n}"))
    await until(lambda: len(one.handled) + len(other.handled) >= 40, what="all handled")
    assert one.handled
    assert other.handled
    assert sorted(one.tasks + other.tasks) == sorted(f"t{n}" for n in range(40))
    await settled(bus, 40)
    assert await last(bus, "DEAD", ">") is None
    assert await messages(bus, "DEAD") == 0
