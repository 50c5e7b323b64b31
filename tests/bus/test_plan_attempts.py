"""A plan answers for the newest attempt that reaches SCALE, wherever SCALE dies: a second copy loses no task."""

from collections.abc import Awaitable, Callable
from typing import Any, Literal, NamedTuple

import pytest
from msgspec.structs import replace
from support.builders import ad, awarded, envelope
from support.crash_process import bus_of
from support.phase_harness import Replica, Stage
from support.wait import until

from loom.bus.hops.hop_loop import HopLoop
from loom.bus.natsio.kv import Bucket
from loom.bus.natsio.publishing import PubAckFuture
from loom.bus.natsio.stored_message import last_message
from loom.bus.topology import SCALE_LANE
from loom.phases.evaluate.retry_policy import notice_of
from loom.phases.scale import subtask_graph
from loom.phases.sense.estimate import with_division
from loom.schemas.auction import Award
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope
from loom.schemas.errors import BusUnavailable
from loom.schemas.notices import ParentEnded, PlanTimeout, read_scale_message
from loom.schemas.plan import SplitPlan, parse_plan
from loom.schemas.record import TaskRecord
from loom.schemas.task import PhaseUsage, RunResult, TaskError

PLAN = [{"id": "a", "description": "do a"}, {"id": "b", "description": "do b", "dependencies": ["a"]}]
PARKED = 2
"""The attempt that was parked first."""
State = Literal["running", "joining", "done"]


# -- a divided task


async def divided(stage: Stage, state: State) -> SplitPlan:
    """A task whose plan is stored and in that state; its own message is gone."""
    env = awarded(envelope(ad(task_id="p", context={"plan": PLAN}, token_budget=1000), now=stage.bus.clock.now()))
    assert env.spec is not None
    env = replace(env, attempt=PARKED, spec=with_division(env.spec, env.ad, 0, ClusterConfig()))
    await stage.record(replace(env, award=None))
    plan = subtask_graph.start_plan(env, parse_plan(str(PLAN).replace("'", '"')))
    for name in () if state == "running" else ("a", "b"):
        failed = state == "done" and name == "b"
        plan = subtask_graph.record_child(plan, await ended(stage, plan, name, "failed" if failed else "succeeded"))
    assert plan.state == state
    await stage.bus.bucket("plans", SplitPlan).create("p", plan)
    return plan


async def ended(stage: Stage, plan: SplitPlan, name: str, state: Any = "succeeded") -> TaskRecord:
    """The stored record of a subtask that has ended."""
    (part,) = [part for part in plan.subtasks if part.id == name]
    child = awarded(subtask_graph.child_envelope(plan, part, {}, stage.bus.clock.now()))
    if state == "failed":
        child = replace(child, error=TaskError(code="agent_failed", message="it broke"))
    else:
        child = replace(child, result=RunResult(content=f"out {name}", completion_tokens=10))
    return await stage.record(child, state=state, ended_at=stage.bus.clock.now())


async def stored(stage: Stage) -> SplitPlan:
    entry = await stage.bus.bucket("plans", SplitPlan).get("p")
    assert entry is not None
    return entry.value


def copy_of(plan: SplitPlan, attempt: int) -> Envelope:
    """A second copy of the task to SCALE, with an attempt of its own."""
    award = Award(node_id="n9", host_id="h9", score=0.4)
    facts: dict[str, Any] = {"failures": 1, "excluded": ("n1",), "budget": 900}
    return replace(plan.envelope, attempt=attempt, award=award, **facts)


async def carried(stage: Stage) -> set[int]:
    """The attempts of which a hop to a later phase, or the timer, is stored."""
    found = set()
    subjects = stage.bus.subjects
    for subject in (
        subjects.task("execute", "*", "p"),
        subjects.task("evaluate", "*", "p"),
        subjects.later("*", "p", "*"),
    ):
        message = await last_message(stage.bus.jetstream, subjects.stream("TASKS"), subject)
        if message is not None:
            read = read_scale_message(message.data)
            found.add(read.envelope.attempt if isinstance(read, PlanTimeout) else read.attempt)  # type: ignore[union-attr]
    return found


# -- a SCALE that dies


class Point(NamedTuple):
    """Where a replica dies the first time: at a call of `method`, made before that or not."""

    owner: type
    method: str
    when: Callable[..., bool]
    calls: bool = False


POINTS = {
    "nowhere": Point(HopLoop, "_checkpoint", lambda *_: False),
    "the plan is written": Point(Bucket, "update", lambda *_: True, calls=True),
    "the hop is published": Point(PubAckFuture, "ack", lambda *_: True),
    "only the ack is missing": Point(HopLoop, "_checkpoint", lambda name: name == "before ack"),
}


def mortal(replica: Replica, point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a replica die at a point, once the server has all its earlier messages."""
    original: Callable[..., Awaitable[Any]] = getattr(point.owner, point.method)

    async def fatal(self: Any, *args: Any, **options: Any) -> Any:
        bus = bus_of(self)
        if bus is not replica.bus or bus.tasks.lost.is_set() or not point.when(*args):
            return await original(self, *args, **options)
        if point.calls:
            await original(self, *args, **options)
        await bus.requests.flush()
        replica.die()
        raise BusUnavailable("killed")

    monkeypatch.setattr(point.owner, point.method, fatal)


async def ask(stage: Stage, copy: Envelope, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send a copy to a SCALE that dies at that point, then to another, until no message is left."""
    await stage.hurry(SCALE_LANE, 0.5)
    replica = await stage.phase("scale")
    mortal(replica, POINTS[where], monkeypatch)
    await stage.put("scale", copy)

    async def settled() -> bool:
        return replica.bus.tasks.lost.is_set() or await left(stage) == 0

    await until(settled, what="SCALE has died or is done")
    monkeypatch.undo()
    if replica.bus.tasks.lost.is_set():
        await stage.phase("scale")
        await stage.settled(phase="scale")


async def left(stage: Stage) -> int:
    return await stage.pending("TASKS", stage.bus.subjects.of("task", "scale", "*", "*"))


everywhere = pytest.mark.parametrize("where", POINTS)


@pytest.mark.slow
@everywhere
@pytest.mark.parametrize("attempt", [PARKED, PARKED + 1])
async def test_a_running_plan_joins_for_the_newest_attempt(
    stage: Stage, attempt: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = await divided(stage, "running")
    copy = copy_of(plan, attempt)
    await ask(stage, copy, where, monkeypatch)
    parked = (await stored(stage)).envelope
    expected = copy if attempt > PARKED else plan.envelope
    assert (parked.attempt, parked.award, parked.excluded) == (attempt, expected.award, expected.excluded)
    assert (parked.failures, parked.budget) == (expected.failures, expected.budget)
    assert await carried(stage) == {attempt}, "the timer"
    assert await stage.pending("TASKS", stage.bus.subjects.later("scale", "p", "timer")) == 1
    assert not stage.all("task", phase="execute")
    for name in ("a", "b"):
        await stage.seen("task", phase="sense", task_id=subtask_graph.child_id("p", name))
        await end(stage, name)
    joined = await stage.seen("task", phase="execute")
    assert (joined.attempt, joined.award) == (attempt, expected.award)
    assert joined.inputs == {"a": "out a", "b": "out b"}
    assert joined.budget == (expected.budget or 0) - 20


async def end(stage: Stage, name: str) -> None:
    notice = notice_of(await ended(stage, await stored(stage), name))
    assert notice is not None
    await stage.notify(notice)


@pytest.mark.slow
@everywhere
@pytest.mark.parametrize("attempt", [PARKED, PARKED + 1])
async def test_a_joining_plan_gives_its_outputs_to_the_attempt_that_asks(
    stage: Stage, attempt: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = await divided(stage, "joining")
    copy = copy_of(plan, attempt)
    await ask(stage, copy, where, monkeypatch)
    joined = await stage.seen("task", phase="execute")
    expected = copy if attempt > PARKED else plan.envelope
    assert (joined.attempt, joined.award, joined.excluded) == (attempt, expected.award, expected.excluded)
    assert joined.inputs == {"a": "out a", "b": "out b"}
    assert joined.budget == (expected.budget or 0) - 20
    assert await carried(stage) == {attempt}
    published = [one.headers["Nats-Msg-Id"] for one in stage.recorded if one.parsed.tokens.get("phase") == "execute"]
    assert {one.partition("-")[0] for one in published} == {"p:task"}, "named after the message that asked"


@pytest.mark.slow
@everywhere
@pytest.mark.parametrize("attempt", [PARKED, PARKED + 1])
async def test_a_failed_plan_fails_the_attempt_that_asks(
    stage: Stage, attempt: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = await divided(stage, "done")
    await ask(stage, copy_of(plan, attempt), where, monkeypatch)
    failed = await stage.seen("task", phase="evaluate")
    assert (failed.attempt, failed.error.code, failed.spent.tokens) == (attempt, "subtask_failed", 10)
    assert await carried(stage) == {attempt}


@pytest.mark.slow
@everywhere
@pytest.mark.parametrize("state", ["running", "joining", "done"])
async def test_an_older_attempt_changes_nothing_and_the_newer_one_goes_on(
    stage: Stage, state: State, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = await divided(stage, state)
    await ask(stage, copy_of(plan, PARKED - 1), where, monkeypatch)
    assert await stored(stage) == plan
    assert await carried(stage) == set()
    assert await left(stage) == 0
    await stage.phase("scale")
    await stage.put("scale", plan.envelope)
    await stage.settled(phase="scale")
    assert await carried(stage) == {PARKED}


async def test_a_plan_that_is_over_fails_a_task_that_is_not(stage: Stage) -> None:
    """A notice ended the plan, but the task's record is still running: no other message would end it."""
    plan = await divided(stage, "running")
    await stage.phase("scale")
    await stage.notify(ParentEnded(task_id="p"))
    await stage.settled(phase="scale")
    await stage.put("scale", copy_of(plan, PARKED + 1))
    failed = await stage.seen("task", phase="evaluate")
    assert (failed.attempt, failed.error.code) == (PARKED + 1, "subtask_failed")


async def test_a_timer_set_for_an_older_attempt_ends_the_newest(stage: Stage) -> None:
    plan = await divided(stage, "running")
    await stage.bus.bucket("plans", SplitPlan).update("p", subtask_graph.with_newer_attempt(plan, copy_of(plan, 5)), 1)
    await stage.phase("scale")
    timeout = PlanTimeout(envelope=plan.envelope)
    await stage.bus.jetstream.publish(stage.bus.subjects.task("scale", "normal", "p"), timeout, msg_id="due")
    late = await stage.seen("task", phase="evaluate")
    assert (late.attempt, late.error.code) == (5, "deadline_exceeded")


async def test_a_notice_repeated_after_the_join_comes_with_the_newest_attempt(stage: Stage) -> None:
    plan = await divided(stage, "joining")
    await stage.phase("scale")
    await stage.put("scale", copy_of(plan, PARKED + 1))
    await stage.seen("task", phase="execute")
    notice = notice_of(await stage.read(subtask_graph.child_id("p", "b")))
    assert notice is not None
    await stage.notify(notice)
    assert (await stage.seen("task", phase="execute", count=2)).attempt == PARKED + 1


def test_the_tokens_of_the_plan_are_charged_to_a_newer_attempt_once() -> None:
    usage = PhaseUsage(requests=1, prompt_tokens=40)
    env = envelope(ad(task_id="p"), now=0.0, budget=1000)
    plan = subtask_graph.start_plan(
        replace(env, phase_usage={"scale": usage}, budget=960), parse_plan('[{"id":"a","description":"x"}]')
    )
    newer = subtask_graph.with_newer_attempt(plan, replace(env, attempt=2, budget=1000))
    assert (newer.envelope.budget, newer.envelope.phase_usage["scale"]) == (960, usage)
    again = subtask_graph.with_newer_attempt(newer, replace(newer.envelope, attempt=3))
    assert (again.envelope.budget, again.envelope.attempt, again.subtasks) == (960, 3, plan.subtasks)
    assert subtask_graph.with_newer_attempt(again, env) == again
