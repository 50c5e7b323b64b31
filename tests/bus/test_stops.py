"""Stops of EXECUTE: their runs, times and repetitions, and the phases that publish a cancellation."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import ad, awarded, envelope
from support.fake_host import FakeHost, FakeRun
from support.phase_harness import Asker, Stage, quiet
from support.wait import until

from loom.phases.execute.stops import STOPS
from loom.phases.execute.timings import ExecuteTimings
from loom.runner.timings import ServiceTimings
from loom.schemas.envelope import Claim, Envelope
from loom.schemas.run import RunEvent, Stop
from loom.schemas.task import TaskError, TaskResult

CANCELLED = TaskError(code="cancelled", message="the task was cancelled")
Script = Callable[[FakeRun], Awaitable[None]]


@pytest.fixture
def timings() -> ServiceTimings:
    return ServiceTimings(execute=ExecuteTimings(repeat_stop_s=0.05, accept_s=0.4, silence_s=0.3))


async def host(stage: Stage, run: Script | None, host_id: str = "h1", owner: str = "local") -> FakeHost:
    return await FakeHost(await stage.connect("node"), host_id, owner=owner, run=run).start()


async def given(stage: Stage, **facts: Any) -> Envelope:
    env = awarded(envelope(ad(), now=stage.bus.clock.now(), **facts))
    await stage.record(env)
    await stage.put("execute", env)
    return env


async def code_of(stage: Stage) -> str:
    error = (await stage.seen("task", phase="evaluate")).error
    assert error is not None
    return str(error.code)


async def hang(run: FakeRun) -> None:
    await run.publish("accepted")
    while True:
        await run.publish("heartbeat")
        await asyncio.sleep(0.05)


async def accepted(run: FakeRun) -> None:
    await run.publish("accepted")


async def flood(run: FakeRun) -> None:
    await run.bus.connection.publish(run.subject, [RunEvent(seq=n, kind="heartbeat") for n in range(20)])


# -- stops of runs


async def test_a_cancelled_run_is_stopped_until_its_last_event_and_not_counted(stage: Stage) -> None:
    one = await host(stage, accepted)
    execute = await stage.phase("execute")
    env = await given(stage)
    await until(lambda: one.runs, what="it runs")
    await stage.bus.connection.publish(stage.bus.subjects.of("cancelled", env.task_id))
    await until(lambda: len(one.stops) == 2, what="it is stopped twice")
    await one.runs[0].publish("error", error=CANCELLED)
    await quiet(stage.bus, execute.bus, one.bus)
    sent = len(one.stops)
    stopped_at = time.monotonic()
    await until(lambda: time.monotonic() > stopped_at + 0.25, what="the time of several stops")
    assert len(one.stops) == sent < STOPS
    assert set(one.stops) == {Stop(task_id=env.task_id, attempt=1, why="cancelled")}
    assert not execute.bus.discards.hosts


@pytest.mark.slow
async def test_a_host_that_does_not_obey_is_sent_five_stops(stage: Stage) -> None:
    one = await host(stage, hang)
    await stage.phase("execute")
    env = await given(stage)
    await until(lambda: one.runs, what="it runs")
    await stage.bus.connection.publish(stage.bus.subjects.of("cancelled", env.task_id))
    await until(lambda: len(one.stops) == STOPS, what="five stops")
    beats = one.runs[0].seq
    await until(lambda: one.runs[0].seq > beats + 5, what="a quarter of a second")
    assert len(one.stops) == STOPS


def test_stops_are_a_second_apart() -> None:
    assert ExecuteTimings.repeat_stop_s == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "facts", "code", "why"),
    [
        (accepted, {}, "node_lost", "silent"),
        (hang, {"left_s": 0.4}, "deadline_exceeded", "late"),
        (flood, {}, "agent_failed", "flooded"),
    ],
)
async def test_a_run_that_is_given_up_is_stopped(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, script: Script, facts: dict[str, Any], code: str, why: str
) -> None:
    monkeypatch.setattr("loom.phases.execute.run_stream.MAX_RUN_EVENTS", 10 if why == "flooded" else 1000)
    one = await host(stage, script)
    await stage.phase("execute")
    env = await given(stage, **facts)
    assert await code_of(stage) == code
    await until(lambda: one.stops, what="it is stopped")
    assert one.stops[0] == Stop(task_id=env.task_id, attempt=1, why=why)


@pytest.mark.parametrize("script", [FakeRun.succeed, None])
async def test_a_run_that_has_ended_or_goes_on_elsewhere_is_not_stopped(stage: Stage, script: Script | None) -> None:
    one = await host(stage, script or hang)
    execute = await stage.phase("execute")
    await given(stage)
    if script is None:
        await until(lambda: one.runs, what="it runs")
        await execute.service.drain(0)
    else:
        await stage.seen("task", phase="evaluate")
    await quiet(stage.bus, one.bus)
    assert not one.stops


async def test_the_end_of_an_ended_task_stops_the_attempt_in_its_record(stage: Stage) -> None:
    one = await host(stage, hang, "h7", "acme")
    await stage.phase("execute")
    env = awarded(envelope(ad(), now=stage.bus.clock.now()))
    held = Claim(attempt=3, node_id="n1", owner="acme", host_id="h7", instance="gone")
    await stage.record(env, state="cancelled", ended_at=1.0, claim=held)
    await stage.put("execute", env)
    await until(lambda: one.stops, what="it is stopped")
    assert one.stops[0] == Stop(task_id=env.task_id, attempt=3, why="ended")


async def test_a_message_past_the_deadline_stops_the_attempt_in_the_record(stage: Stage) -> None:
    one = await host(stage, hang)
    await stage.phase("execute")
    env = awarded(envelope(ad(), now=stage.bus.clock.now(), left_s=-1))
    await stage.claimed(env, attempt=1)
    await stage.put("execute", env)
    assert await code_of(stage) == "deadline_exceeded"
    await until(lambda: one.stops, what="it is stopped")
    assert one.stops[0] == Stop(task_id=env.task_id, attempt=1, why="late")


@pytest.mark.parametrize(
    ("claim_on", "reason", "attempt", "stopped"),
    [
        ("h2", None, 2, True),
        ("h2", "node_lost", 2, True),
        ("h2", "agent_failed", 3, True),
        ("h2", "agent_failed", 2, False),
        ("h2", "node_busy", 2, False),
        ("h1", None, 2, False),
    ],
)
async def test_a_claim_stops_the_lower_attempt_that_may_still_run_on_another_host(
    stage: Stage, claim_on: str, reason: str | None, attempt: int, stopped: bool
) -> None:
    one = await host(stage, FakeRun.succeed)
    two = await host(stage, hang, "h2")
    await stage.phase("execute")
    error = TaskError(code=reason, message="so it was") if reason else None
    env = awarded(envelope(ad(), now=stage.bus.clock.now(), attempt=attempt, last_error=error))
    await stage.record(env, claim=Claim(attempt=1, node_id="n1", host_id=claim_on, instance="x"))
    await stage.put("execute", env)
    await stage.seen("task", phase="evaluate")
    if stopped:
        await until(lambda: two.stops, what="it is stopped")
        assert two.stops[0] == Stop(task_id=env.task_id, attempt=1, why="superseded")
    await quiet(stage.bus, one.bus, two.bus)
    assert not one.stops
    assert bool(two.stops) is stopped


# -- publishers of a cancellation


async def cancelled_at(stage: Stage, count: int) -> None:
    await stage.seen("cancelled", task_id="t1", count=count)


async def test_sense_publishes_a_cancel_after_its_record_and_again_when_repeated(stage: Stage) -> None:
    await stage.phase("sense")
    await stage.record(envelope(ad(task_id="t1"), now=stage.bus.clock.now()))
    asker = Asker(stage.bus)
    for count in (1, 2):
        await asker.ask(stage.bus.subjects.of("cancel", "t1"))
        await cancelled_at(stage, count)
        assert (await asker.answer(TaskResult, count=count)).state == "cancelled"


async def test_a_cancel_without_a_reply_subject_counts(stage: Stage) -> None:
    await stage.phase("sense")
    await stage.record(envelope(ad(task_id="t1"), now=stage.bus.clock.now()))
    await stage.bus.connection.publish(stage.bus.subjects.of("cancel", "t1"))
    await cancelled_at(stage, 1)
    assert (await stage.read("t1")).state == "cancelled"


async def test_a_task_that_has_ended_otherwise_is_not_published_as_cancelled(stage: Stage) -> None:
    sense = await stage.phase("sense")
    await stage.record(envelope(ad(task_id="t1"), now=stage.bus.clock.now()), state="succeeded", ended_at=1.0)
    asker = Asker(stage.bus)
    await asker.ask(stage.bus.subjects.of("cancel", "t1"))
    await asker.answer(TaskResult)
    await quiet(stage.bus, sense.bus)
    assert not stage.all("cancelled")


@pytest.mark.parametrize("recorded", [True, False])
async def test_evaluate_publishes_a_cancel_that_sense_could_not(stage: Stage, recorded: bool) -> None:
    await stage.phase("evaluate")
    env = awarded(envelope(ad(task_id="t1"), now=stage.bus.clock.now()))
    await stage.record(env, **({"state": "cancelled", "ended_at": 1.0} if recorded else {}))
    await stage.put("evaluate", replace(env, error=CANCELLED))
    await cancelled_at(stage, 1)
