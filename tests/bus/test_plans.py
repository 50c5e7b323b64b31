"""SCALE divides a task: its messages and records, also when messages come twice, late or never."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import ad, awarded, envelope
from support.phase_harness import Stage, quiet
from support.wait import until

from loom.bus import task_client
from loom.bus.hops.hop_loop import schedule
from loom.bus.natsio.transport.message import Msg
from loom.bus.records import records
from loom.bus.topology import SCALE_LANE
from loom.phases.evaluate.retry_policy import notice_of
from loom.phases.scale.subtask_graph import child_id
from loom.phases.sense.estimate import with_division
from loom.schemas.auction import Award
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope, Split
from loom.schemas.llm import CompletionParams, CompletionResult
from loom.schemas.notices import ParentEnded
from loom.schemas.plan import SplitPlan
from loom.schemas.record import TaskRecord
from loom.schemas.task import Limits, RunResult, TaskError

Part = tuple[str, ...]
DIAMOND: Sequence[Part] = (("top",), ("left", "top"), ("right", "top"), ("end", "left", "right"))


def written(parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [{"id": name, "description": f"do {name}", "dependencies": needs} for name, *needs in parts]


async def awarded_task(stage: Stage, **facts: Any) -> Envelope:
    """A running task, as MATCH sends it to SCALE."""
    options = {name: facts.pop(name) for name in ("left_s", "split") if name in facts}
    env = sensed(awarded(envelope(ad(**{"task_id": "p", **facts}), now=stage.bus.clock.now(), **options)))
    await stage.record(replace(env, award=None))
    return env


def sensed(env: Envelope, **facts: Any) -> Envelope:
    """The envelope with the decision of SENSE about dividing its task."""
    assert env.spec is not None
    return replace(env, spec=with_division(replace(env.spec, **facts), env.ad, env.depth, ClusterConfig()))


async def divided(stage: Stage, parts: Sequence[Part], **facts: Any) -> Envelope:
    """A task whose ad gives its plan, sent to SCALE."""
    env = await awarded_task(stage, context={"plan": written(parts)}, **facts)
    await stage.put("scale", env)
    return env


async def begun(stage: Stage, name: str, parent: str = "p", *, count: int = 1) -> Envelope:
    """The first envelope of a subtask."""
    found = await stage.seen("task", phase="sense", task_id=child_id(parent, name), count=count)
    assert isinstance(found, Envelope)
    return found


async def end(stage: Stage, child: Envelope, state: Any = "succeeded", tokens: int = 0, **facts: Any) -> TaskRecord:
    """End a subtask as EVALUATE does: its record, then the notice."""
    assert child.split is not None
    result = RunResult(content=f"out {child.split.subtask}", completion_tokens=tokens)
    error = None if state == "succeeded" else TaskError(code="agent_failed", message="it broke")
    over = awarded(replace(child, result=result if error is None else None, error=error, **facts))
    record = await stage.record(over, state=state, ended_at=stage.bus.clock.now())
    await notify_end(stage, record)
    return record


async def notify_end(stage: Stage, record: TaskRecord) -> None:
    notice = notice_of(record)
    assert notice is not None
    await stage.notify(notice)


async def ended(stage: Stage, name: str, **facts: Any) -> TaskRecord:
    return await end(stage, await begun(stage, name), **facts)


async def stored(stage: Stage, parent: str = "p") -> SplitPlan | None:
    entry = await stage.bus.bucket("plans", SplitPlan).get(parent)
    return entry.value if entry else None


async def dealt_with(stage: Stage) -> None:
    """Wait until SCALE has no message in hand and all its messages are recorded."""
    await stage.settled(phase="scale")
    await quiet(stage.bus)


def ids(stage: Stage, family: str, **tokens: str) -> list[str]:
    """The ids of the recorded messages, oldest first."""
    return [
        one.headers["Nats-Msg-Id"]
        for one in stage.recorded
        if one.parsed.family == family and all(one.parsed.tokens.get(name) == text for name, text in tokens.items())
    ]


def timers(stage: Stage) -> Any:
    return stage.pending("TASKS", stage.bus.subjects.later("scale", "p", "timer"))


async def reads_of(stage: Stage, bucket: str) -> list[Msg]:
    """Record every read of a bucket from now on."""
    received: list[Msg] = []

    async def record(msg: Msg) -> None:
        received.append(msg)

    await stage.bus.connection.subscribe(f"$JS.API.STREAM.MSG.GET.KV_{stage.bus.subjects.bucket(bucket)}", record)
    await stage.bus.requests.flush()
    return received


# -- the ordinary course


async def test_a_divided_task_is_parked_and_its_ready_subtasks_begin(stage: Stage) -> None:
    await stage.phase("scale")
    env = await divided(stage, (("a",), ("b",), ("c", "a", "b")), token_budget=1000, priority="high")
    first, second = await begun(stage, "a"), await begun(stage, "b")
    await dealt_with(stage)
    assert ids(stage, "task", phase="sense") == [f"{child_id('p', name)}:begin" for name in ("a", "b")]
    assert (first.ad.description, first.priority, first.deadline) == ("do a", "high", env.deadline)
    assert first.split == Split(parent="p", depth=1, subtask="a", grant=first.budget, deadline=env.deadline)
    assert second.budget == first.budget == 266
    plan = await stored(stage)
    assert plan is not None
    assert (plan.state, plan.envelope) == ("running", env)
    assert [part.state for part in plan.subtasks] == ["running", "running", "waiting"]
    assert ids(stage, "later") == ["p:timer-1"]
    assert await timers(stage) == 1
    assert not stage.all("task", phase="execute")


async def test_a_waiting_subtask_begins_as_soon_as_its_own_needs_are_met(stage: Stage) -> None:
    await stage.phase("scale")
    await divided(stage, (("slow",), ("a",), ("b", "a"), ("c", "b")))
    await begun(stage, "slow")
    await ended(stage, "a")
    child = await begun(stage, "b")
    assert child.split is not None
    assert child.split.inputs == {"a": "out a"}
    await ended(stage, "b")
    assert (await begun(stage, "c")).split.inputs == {"b": "out b"}  # type: ignore[union-attr]
    assert not stage.all("task", phase="execute")


async def test_the_join_passes_all_outputs_in_the_plans_order_and_drops_the_timer(stage: Stage) -> None:
    await stage.phase("scale")
    env = await divided(stage, DIAMOND, token_budget=1000)
    for name in ("top", "right", "left"):
        await ended(stage, name, tokens=100)
    last = await begun(stage, "end")
    assert last.split is not None
    assert last.split.inputs == {"left": "out left", "right": "out right"}
    await end(stage, last, tokens=100)
    joined = await stage.seen("task", phase="execute")
    assert list(joined.inputs.items()) == [(name, f"out {name}") for name in ("top", "left", "right", "end")]
    assert (joined.award, joined.attempt, joined.budget, joined.split) == (env.award, 1, 600, None)
    assert ids(stage, "task", phase="execute") == ["p:join-1"]
    await dealt_with(stage)
    assert await timers(stage) == 0
    plan = await stored(stage)
    assert plan is not None
    assert (plan.state, {part.state for part in plan.subtasks}) == ("joining", {"succeeded"})


async def test_a_parent_that_has_ended_is_over_for_its_plan_too(stage: Stage) -> None:
    await stage.phase("scale")
    env = await divided(stage, (("a",),))
    await ended(stage, "a")
    await stage.seen("task", phase="execute")
    await stage.notify(ParentEnded(task_id=env.task_id))
    await dealt_with(stage)
    assert (await stored(stage)).state == "done"  # type: ignore[union-attr]
    assert not stage.all("task", phase="evaluate")


async def test_many_ends_at_once_make_each_change_once_under_two_replicas(stage: Stage) -> None:
    await asyncio.gather(stage.phase("scale"), stage.phase("scale"))
    names = [f"s{n}" for n in range(15)]
    await divided(stage, [*((name,) for name in names), ("end", *names)])
    children = [await begun(stage, name) for name in names]
    records = [await stage.record(_good(child), state="succeeded", ended_at=1.0) for child in children]
    await asyncio.gather(*(notify_end(stage, record) for record in records))
    last = await begun(stage, "end")
    assert last.split is not None
    assert list(last.split.inputs) == names
    await end(stage, last)
    await stage.seen("task", phase="execute")
    await dealt_with(stage)
    assert len(ids(stage, "task", phase="sense")) == 16
    assert len(ids(stage, "task", phase="execute")) == 1
    assert len(ids(stage, "later")) == 2  # when parts began: at first, and for the last one


def _good(child: Envelope) -> Envelope:
    return awarded(replace(child, result=RunResult(content="out")))


async def test_a_task_that_cannot_have_a_plan_costs_no_lookup(stage: Stage) -> None:
    reads = await reads_of(stage, "plans")
    await stage.phase("scale", llm=Scripted("unasked"))
    await stage.put("scale", await awarded_task(stage))
    await stage.seen("task", phase="execute")
    await quiet(stage.bus)
    assert not reads


async def test_clients_get_an_event_when_a_subtask_begins_and_when_it_ends(stage: Stage) -> None:
    await stage.phase("scale")
    env = await awarded_task(stage, context={"plan": written((("a",), ("b", "a")))})
    await stage.put("scale", replace(env, submitter="acme"))
    await ended(stage, "a", tokens=3)
    await ended(stage, "b", state="failed")
    await stage.seen("task", phase="evaluate")
    events = stage.all("subtask", submitter="acme", parent_id="p")
    assert [(one.subtask, one.state, one.child_state, one.node_id, one.owner, one.error) for one in events] == [
        ("a", "begun", None, None, None, ""),
        ("a", "ended", "succeeded", "n1", "local", ""),
        ("b", "begun", None, None, None, ""),
        ("b", "ended", "failed", "n1", "local", "agent_failed"),
    ]
    assert {one.parent_id for one in events} == {"p"}
    assert {one.child_id for one in events} == {child_id("p", "a"), child_id("p", "b")}
    assert [one.description for one in events] == ["do a", "do a", "do b", "do b"]
    assert [one.at for one in events] == sorted(one.at for one in events)
    assert len(stage.all("subtask")) == len(events)
    assert (await begun(stage, "a")).submitter == "acme"


async def test_events_are_repeated_with_their_notice_and_only_for_subtasks_of_the_plan(stage: Stage) -> None:
    await stage.phase("scale")
    await divided(stage, (("a",), ("b",)))
    record = await ended(stage, "a")
    await notify_end(stage, record)
    stranger = replace(record.envelope, ad=replace(record.envelope.ad, task_id="x"))
    await end(stage, replace(stranger, result=None))
    await dealt_with(stage)
    assert sorted((one.subtask, one.state) for one in stage.all("subtask")) == [
        ("a", "begun"),
        ("a", "ended"),
        ("a", "ended"),
        ("b", "begun"),
    ]


# -- messages that come twice, late or never


async def test_all_that_follows_is_published_again_under_the_same_ids(stage: Stage) -> None:
    await stage.phase("scale")
    env = await divided(stage, (("a",), ("b",), ("c", "a"), ("d", "b")))
    await begun(stage, "a")
    await stage.put("scale", env)
    await begun(stage, "b", count=2)
    record = await ended(stage, "a")
    await begun(stage, "c")
    await notify_end(stage, record)
    await begun(stage, "c", count=2)
    await dealt_with(stage)
    sent = ids(stage, "task", phase="sense")
    assert {name: sent.count(f"{child_id('p', name)}:begin") for name in "abcd"} == {"a": 2, "b": 2, "c": 2, "d": 0}
    assert await stage.pending("TASKS", stage.bus.subjects.of("task", "sense", "*", "*")) == 3
    assert await timers(stage) == 1
    last = [await ended(stage, name) for name in ("b", "c", "d")][-1]
    await stage.seen("task", phase="execute")
    await notify_end(stage, last)
    await stage.seen("task", phase="execute", count=2)
    await dealt_with(stage)
    assert ids(stage, "task", phase="execute") == ["p:join-1"] * 2
    assert await stage.pending("TASKS", stage.bus.subjects.of("task", "execute", "*", "*")) == 1
    assert await timers(stage) == 0


async def test_twins_of_the_parent_make_one_plan_for_the_node_that_was_first(stage: Stage) -> None:
    await stage.phase("scale")
    env = await awarded_task(stage, context={"plan": written((("a",),))})
    await stage.put("scale", env)
    await begun(stage, "a")
    await stage.put("scale", replace(env, award=Award(node_id="n2", host_id="h2")))
    await begun(stage, "a", count=2)
    await ended(stage, "a")
    assert (await stage.seen("task", phase="execute")).award == env.award


async def test_a_notice_before_its_time_or_without_a_plan_changes_nothing(stage: Stage) -> None:
    await stage.phase("scale")
    await divided(stage, (("a",),))
    child = await begun(stage, "a")
    record = await stage.record(child)
    await notify_end(stage, record)  # the subtask still runs
    stranger = replace(child, ad=replace(child.ad, task_id="x"), split=replace(child.split, parent="y"))  # type: ignore[type-var]
    await end(stage, stranger)
    mistaken = replace(child, ad=replace(child.ad, task_id="z"))
    await end(stage, mistaken)  # a subtask that is not in the plan
    await dealt_with(stage)
    assert (await stored(stage)).subtasks[0].state == "running"  # type: ignore[union-attr]
    assert not stage.all("task", phase="execute") + stage.all("task", phase="evaluate")


@pytest.mark.slow
async def test_a_parked_task_fails_at_its_deadline(stage: Stage) -> None:
    await stage.phase("scale")
    await divided(stage, (("a",),), left_s=0.6)
    await begun(stage, "a")
    late = await stage.seen("task", phase="evaluate")
    assert (late.task_id, late.error.code) == ("p", "deadline_exceeded")
    assert "subtasks" in late.error.message
    assert late.hops[-1].finished >= late.deadline - 0.5
    await dealt_with(stage)
    assert await timers(stage) == 0


@pytest.mark.slow
async def test_the_servers_clock_decides_when_a_parked_task_is_late(stage: Stage) -> None:
    """A replica whose clock is behind still accepts the timer."""
    scale = await stage.phase("scale")
    scale.bus.clock._offset_s -= 30
    await divided(stage, (("a",),), left_s=0.6)
    assert (await stage.seen("task", phase="evaluate")).error.code == "deadline_exceeded"


async def test_a_task_joined_late_leaves_its_own_next_attempt_alone(stage: Stage) -> None:
    """The timer is purged, and nothing else that waits under the parent's id: a retry waits there too."""
    await stage.phase("scale")
    await divided(stage, (("a",),))
    record = await ended(stage, "a")
    await stage.seen("task", phase="execute")
    await stage.bus.jetstream.publish(stage.bus.subjects.later("scale", "p", "task-77"), b"{}", headers={})
    await notify_end(stage, record)
    await stage.seen("task", phase="execute", count=2)
    await dealt_with(stage)
    assert await stage.pending("TASKS", stage.bus.subjects.later("scale", "p", "task-77")) == 1


async def test_the_timer_of_a_plan_joined_by_another_replica_is_removed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def late(*args: Any, **facts: Any) -> None:
        plans = stage.bus.bucket("plans", SplitPlan)
        entry = await plans.get("p")
        assert entry is not None
        await plans.update("p", replace(entry.value, state="joining"), entry.revision)
        await schedule(*args, **facts)

    monkeypatch.setattr("loom.phases.scale.division.schedule", late)
    await stage.phase("scale")
    await divided(stage, (("a",),))
    await stage.seen("later")
    await dealt_with(stage)
    assert await timers(stage) == 0
    assert not stage.all("task", phase="sense")


async def test_a_synthesis_on_its_way_to_another_node_is_not_divided_again(stage: Stage) -> None:
    await stage.phase("scale")
    env = await divided(stage, (("a",),))
    await ended(stage, "a")
    joined = await stage.seen("task", phase="execute")
    again = replace(joined, attempt=2, award=Award(node_id="n2", host_id="h2"))
    await stage.put("scale", again)
    passed = await stage.seen("task", phase="execute", count=2)
    assert (passed.attempt, passed.award, passed.inputs) == (2, again.award, {"a": "out a"})
    assert len(ids(stage, "task", phase="sense")) == 1
    assert env.ad == passed.ad


async def test_a_dead_notice_ends_the_parent_it_is_about(stage: Stage) -> None:
    parent = await divided(stage, (("a",), ("b",)), split=Split(parent="g", depth=1, subtask="p", deadline=1e10))
    scale = await stage.phase("scale")
    child = await begun(stage, "a")
    scale.die()
    await end(stage, child)
    await stage.reject(SCALE_LANE, 10)
    await stage.phase("scale")
    over = await stage.seen("task", phase="evaluate", within_s=10)
    assert (over.task_id, over.error.code, over.ad, over.split) == ("p", "dead_letter", parent.ad, parent.split)


async def test_a_dead_notice_about_the_end_of_a_task_leaves_it_as_it_ended(stage: Stage) -> None:
    await stage.record(envelope(ad(task_id="p"), now=stage.bus.clock.now()), state="succeeded", ended_at=1.0)
    await stage.notify(ParentEnded(task_id="p"))
    await stage.reject(SCALE_LANE, 10)
    await stage.phase("scale")
    await stage.seen("dead", phase="scale", task_id="p", within_s=10)
    await stage.settled(phase="scale")
    assert not stage.all("task", phase="evaluate")


# -- ends


async def test_a_failed_subtask_fails_the_parent_with_its_reason(stage: Stage) -> None:
    await stage.phase("scale")
    await divided(stage, (("a",), ("b",), ("c", "a")))
    second = await begun(stage, "b")
    record = await ended(stage, "a", state="failed")
    failed = await stage.seen("task", phase="evaluate")
    assert (failed.task_id, failed.error.code) == ("p", "subtask_failed")
    assert failed.error.message == "subtask a ended with agent_failed: it broke"
    await notify_end(stage, record)
    await stage.seen("task", phase="evaluate", count=2)
    await end(stage, second)
    await dealt_with(stage)
    assert ids(stage, "task", phase="evaluate") == ["p:planfail-1"] * 2
    assert not ids(stage, "task", phase="sense", task_id=child_id("p", "c"))
    assert await timers(stage) == 0


async def test_a_spent_budget_ends_the_task_with_the_outputs_so_far(stage: Stage) -> None:
    await stage.phase("scale")
    await divided(stage, (("a",), ("b", "a"), ("c", "b")), token_budget=1000)
    await ended(stage, "a", tokens=10)
    await ended(stage, "b", tokens=2000)
    failed = await stage.seen("task", phase="evaluate")
    assert (failed.error.code, failed.result.content) == ("budget_exceeded", "out a\n\nout b")
    await dealt_with(stage)
    assert len(ids(stage, "task", phase="sense")) == 2


async def test_no_subtask_begins_for_a_parent_that_has_ended(stage: Stage) -> None:
    env = await awarded_task(stage, context={"plan": written((("a",),))})
    await records(stage.bus).update_with("p", lambda record: replace(record, state="cancelled", ended_at=1.0))
    await stage.phase("scale")
    await stage.put("scale", env)
    await dealt_with(stage)
    assert not stage.all("task", phase="sense")
    assert (await stored(stage)).state == "done"  # type: ignore[union-attr]
    assert await timers(stage) == 0


async def test_a_cancel_reaches_children_and_their_children_and_those_not_admitted_yet(stage: Stage) -> None:
    await asyncio.gather(*(stage.phase(name) for name in ("scale", "sense", "evaluate")))
    plan = {"plan": written((("x",), ("y", "x")))}
    await divided(stage, (("a",), ("b",), ("c", "a")))
    first = await stage.seen("task", phase="match", task_id=child_id("p", "a"))
    await stage.put("scale", sensed(awarded(replace(first, ad=replace(first.ad, context=plan)))))
    inner = child_id(first.task_id, "x")
    await stage.seen("task", phase="match", task_id=inner)
    assert (await task_client.cancel(stage.bus, "p")).state == "cancelled"
    for name in (first.task_id, child_id("p", "b"), inner):
        assert (await stage.seen("result", task_id=name)).state == "cancelled"
    late = replace(first, ad=replace(first.ad, task_id="late"), spec=None)
    await stage.put("sense", late)
    assert (await stage.seen("result", task_id="late")).state == "cancelled"
    await asyncio.gather(*(stage.settled(phase=name) for name in ("scale", "sense", "evaluate")))
    assert [(await stored(stage, name)).state for name in ("p", first.task_id)] == ["done", "done"]  # type: ignore[union-attr]
    assert await stage.pending("TASKS", stage.bus.subjects.of("later", "*", "*", "*")) == 0


async def test_a_cancel_while_a_notice_waits_ends_the_task_as_itself(stage: Stage) -> None:
    scale = await stage.phase("scale")
    env = await divided(stage, (("a",), ("b",)))
    child = await begun(stage, "a")
    scale.die()
    await end(stage, child)  # no replica takes the notice
    await asyncio.gather(stage.phase("sense"), stage.phase("evaluate"))
    assert (await task_client.cancel(stage.bus, "p")).state == "cancelled"
    ended = await stage.read("p")
    assert (ended.state, ended.envelope.ad) == ("cancelled", env.ad)
    await stage.seen("result", task_id="p")
    await until(
        lambda: ParentEnded(task_id="p") in stage.all("task", phase="scale"), what="SCALE knows of the parent's end"
    )


# -- depth and unusable plans


@pytest.mark.parametrize(
    ("depth", "limits", "whole"), [(1, None, False), (2, None, True), (1, Limits(max_depth=1), True)]
)
async def test_a_part_is_divided_itself_until_it_is_too_deep(
    stage: Stage, depth: int, limits: Limits | None, *, whole: bool
) -> None:
    await stage.phase("scale")
    split = Split(parent="g", depth=depth, subtask="p", deadline=1e10, inputs={"before": "it"})
    await divided(stage, (("a",),), split=split, limits=limits)
    if whole:
        passed = await stage.seen("task", phase="execute")
        assert passed.spec.note.startswith("not divided: at most")
        assert await stored(stage) is None
    else:
        child = await begun(stage, "a")
        assert child.split is not None
        assert (child.depth, child.split.parent, child.split.inputs) == (2, "p", {"before": "it"})


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        (written((("a", "b"), ("b", "a"))), "form a cycle: a, b, a|form a cycle: b, a, b"),
        (written((("a", "a"),)), "form a cycle"),
        (written((("a", "x"),)), "subtask a has the unknown dependency x"),
        (written((("a",), ("a",))), "duplicate subtask id a"),
        ([{"id": n, "description": "x"} for n in range(1000)], "1000 subtasks, at most 16"),
        ([], "no JSON list of subtasks"),
        ("do this, then that", "no JSON list of subtasks"),
        ([{"id": "a"}], "subtask a is malformed: .*description"),
        ([{"id": "a b", "description": "x"}], "subtask a b is malformed"),
        ([{"id": "a", "description": "x", "depend_on": ["b"]}], "subtask a has the unknown field depend_on"),
        ({"subtasks": [{"id": "a", "description": "x"}], "order": 1}, "the plan has the unknown field order"),
    ],
)
async def test_a_given_plan_that_breaks_a_rule_ends_the_task_and_names_the_rule(
    stage: Stage, plan: Any, complaint: str
) -> None:
    await stage.phase("scale")
    await stage.put("scale", await awarded_task(stage, context={"plan": plan}))
    failed = await stage.seen("task", phase="evaluate")
    assert failed.error.code == "invalid_plan"
    with pytest.raises(ValueError, match=complaint):
        raise ValueError(failed.error.message)
    assert await stored(stage) is None
    assert await timers(stage) == 0


# -- a model's plan


class Scripted:
    """A model that returns or raises these answers, and keeps its requests."""

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[CompletionParams] = []

    async def complete(self, params: CompletionParams) -> CompletionResult:
        self.asked.append(params)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return CompletionResult(content=answer)

    def stream(self, params: CompletionParams) -> Any:
        raise NotImplementedError


GOOD = json.dumps({"subtasks": written((("a",), ("b", "a")))})
CYCLE = json.dumps(written((("a", "b"), ("b", "a"))))
ALONE = json.dumps(written((("a",),)))


@pytest.mark.parametrize(
    "answer", [GOOD, f"Here is my plan:\n{GOOD}\nGood luck!", f"```json\n{GOOD}\n```", f"[1] as {{you}} like: {GOOD}"]
)
async def test_a_models_plan_is_found_in_prose_and_in_a_fence(stage: Stage, answer: str) -> None:
    model = Scripted(answer)
    await stage.phase("scale", llm=model)
    await stage.put("scale", _hard(await awarded_task(stage)))
    assert (await begun(stage, "a")).ad.description == "do a"
    assert [message.content for message in model.asked[0].messages][-1] == "add two numbers"


async def test_a_bad_plan_is_sent_back_once_with_its_errors(stage: Stage) -> None:
    model = Scripted(CYCLE, GOOD)
    await stage.phase("scale", llm=model)
    await stage.put("scale", _hard(await awarded_task(stage)))
    await begun(stage, "a")
    assert [message.role for message in model.asked[1].messages] == ["system", "user", "assistant", "user"]
    assert model.asked[1].messages[2].content == CYCLE
    assert "form a cycle" in model.asked[1].messages[3].content


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ((CYCLE, "sorry"), "the model's plan cannot be used: the answer holds no JSON list"),
        ((RuntimeError("key sk-1"),), "the model could not be asked: RuntimeError"),
        ((ALONE,), "the model's plan has a single subtask"),
        (
            (json.dumps([{"id": "a", "description": "\ud83d"}]),) * 2,
            "subtask a is malformed: it holds text that is not Unicode",
        ),
    ],
)
async def test_a_task_without_a_usable_plan_runs_whole_with_a_note_and_no_retry(
    stage: Stage, answers: tuple[Any, ...], why: str
) -> None:
    model = Scripted(*answers)
    await stage.phase("scale", llm=model)
    env = _hard(await awarded_task(stage))
    await stage.put("scale", env)
    passed = await stage.seen("task", phase="execute")
    assert passed.spec.note.startswith("not divided: ")
    assert why in passed.spec.note
    assert "sk-1" not in passed.spec.note
    again = replace(passed, attempt=2, award=Award(node_id="n2", host_id="h2"))
    for twin in (env, again):
        await stage.put("scale", twin)
    third = await stage.seen("task", phase="execute", count=3)
    assert third.spec == passed.spec
    assert {one.award.node_id for one in stage.all("task", phase="execute")} == {"n1", "n2"}
    assert len(model.asked) == len(answers)
    assert await timers(stage) == 0


async def test_the_tokens_of_a_plan_are_counted_once_and_come_back_with_the_join(stage: Stage) -> None:
    model = Scripted(CYCLE, GOOD)
    await stage.phase("scale", llm=model)
    env = _hard(await awarded_task(stage, token_budget=100_000))
    await stage.put("scale", env)
    first = await begun(stage, "a")
    await stage.put("scale", env)  # a twin
    await end(stage, first, tokens=40)
    await end(stage, await begun(stage, "b"), tokens=2)
    joined = await stage.seen("task", phase="execute")
    usage = joined.phase_usage["scale"]
    assert (usage.requests, usage.estimated, len(model.asked)) == (2, True, 2)
    assert joined.spent.tokens == 42
    assert joined.budget == 100_000 - usage.tokens - 42


async def test_a_whole_task_is_charged_the_tokens_of_the_plan_once_in_each_attempt(stage: Stage) -> None:
    await stage.phase("scale", llm=Scripted(ALONE))
    env = _hard(await awarded_task(stage, token_budget=100_000))
    await stage.put("scale", env)
    passed = await stage.seen("task", phase="execute")
    for twin in (env, replace(passed, attempt=2)):
        await stage.put("scale", twin)
    third = await stage.seen("task", phase="execute", count=3)
    assert third.phase_usage == passed.phase_usage
    assert third.budget == passed.budget == 100_000 - passed.phase_usage["scale"].tokens


async def test_a_budget_too_small_for_a_plan_leaves_the_task_whole(stage: Stage) -> None:
    model = Scripted(GOOD)
    await stage.phase("scale", llm=model)
    await stage.put("scale", _hard(await awarded_task(stage, token_budget=1000)))
    passed = await stage.seen("task", phase="execute")
    assert "could not be asked: the token budget does not allow it" in passed.spec.note
    assert (passed.budget, passed.phase_usage, model.asked) == (1000, {}, [])


@pytest.mark.slow
async def test_a_failed_plan_and_a_late_one_have_the_tokens_of_their_parts(stage: Stage) -> None:
    await stage.phase("scale")
    await divided(stage, (("a",), ("b",)))
    await end(stage, await begun(stage, "a"), tokens=7)
    await end(stage, await begun(stage, "b"), "failed", spent=RunResult(prompt_tokens=5))
    failed = await stage.seen("task", phase="evaluate")
    assert (failed.error.code, failed.spent.tokens) == ("subtask_failed", 12)
    await divided(stage, (("a",), ("b", "a"), ("c",)), task_id="late", left_s=1)
    await end(stage, await begun(stage, "a", "late"), tokens=9)
    late = await stage.seen("task", phase="evaluate", task_id="late")
    assert (late.error.code, late.spent.tokens) == ("deadline_exceeded", 9)


@pytest.mark.slow
async def test_a_model_that_takes_longer_than_the_task_has_is_not_waited_for(stage: Stage) -> None:
    class Slow(Scripted):
        async def complete(self, params: CompletionParams) -> CompletionResult:
            self.asked.append(params)
            await asyncio.sleep(3600)
            raise AssertionError

    model = Slow()
    await stage.phase("scale", llm=model)
    await stage.put("scale", _hard(await awarded_task(stage, left_s=0.5)))
    passed = await stage.seen("task", phase="execute")
    assert "could not be asked: TimeoutError" in passed.spec.note
    assert 0 < (model.asked[0].timeout_s or 0) <= 0.5


async def test_a_hard_task_without_a_model_runs_whole_with_a_note(stage: Stage) -> None:
    await stage.phase("scale")
    await stage.put("scale", _hard(await awarded_task(stage)))
    spec = (await stage.seen("task", phase="execute")).spec
    assert (spec.note, spec.whole) == ("not divided: no model is configured to plan", True)


async def test_a_decision_not_to_divide_is_stored_and_holds_for_every_copy(stage: Stage) -> None:
    """A replica with a model keeps the decision of a replica without one; a later attempt costs no read."""
    scale = await stage.phase("scale")
    env = _hard(await awarded_task(stage))
    await stage.put("scale", env)
    passed = await stage.seen("task", phase="execute")
    assert (await stored(stage)).subtasks == ()  # type: ignore[union-attr]
    await scale.close()
    model = Scripted(GOOD)
    await stage.phase("scale", llm=model)
    await stage.put("scale", env)
    assert (await stage.seen("task", phase="execute", count=2)).spec == passed.spec
    reads = await reads_of(stage, "plans")
    await stage.put("scale", replace(passed, attempt=2))
    assert (await stage.seen("task", phase="execute", count=3)).spec == passed.spec
    assert (model.asked, reads) == ([], [])


async def test_the_settings_of_scale_do_not_decide_whether_a_task_is_divided(stage: Stage) -> None:
    await stage.phase("scale", ClusterConfig(mitosis_threshold=1.0, max_depth=0), llm=Scripted(GOOD))
    await stage.put("scale", _hard(await awarded_task(stage)))
    assert (await begun(stage, "a")).ad.description == "do a"


async def test_a_task_may_ask_to_be_divided_however_easy_it_is(stage: Stage) -> None:
    await stage.phase("scale", ClusterConfig(max_subtasks=2), llm=Scripted(GOOD))
    await stage.put("scale", await awarded_task(stage, context={"plan": True, "repo": "x"}))
    assert (await begun(stage, "a")).ad.context == {"repo": "x"}


def _hard(env: Envelope) -> Envelope:
    return sensed(env, complexity=0.9)
