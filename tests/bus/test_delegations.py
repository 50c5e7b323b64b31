"""EXECUTE with a run that delegates: the test plays the host, and the phases the delegated task passes."""

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import ad, awarded, envelope
from support.fake_host import FakeHost, FakeRun
from support.phase_harness import Stage, quiet
from support.wait import until

from loom.bus.records import records
from loom.phases.execute.delegation import refusal
from loom.phases.execute.timings import ExecuteTimings
from loom.runner.timings import ServiceTimings
from loom.schemas.envelope import Claim, Envelope, Split
from loom.schemas.record import MAX_DELEGATED, TaskRecord
from loom.schemas.run import delegated_id
from loom.schemas.task import Limits, RunResult, TaskError, TaskResult

CHILD = delegated_id("t1", 1, 1)


@pytest.fixture
def timings() -> ServiceTimings:
    return ServiceTimings(execute=ExecuteTimings(silence_s=1.5))


class Delegating(FakeHost):
    """A host whose one run publishes the events a test gives it on the newest inbox, and heartbeats meanwhile."""

    newest_run: FakeRun | None = None
    beating = True

    async def work(self, run: FakeRun) -> None:
        if self.newest_run is not None and self.newest_run.subject == run.subject:
            return
        if self.newest_run is not None:
            run.seq = self.newest_run.seq
            await self.newest_run.publish("moved")
        self.newest_run = run
        run.seq = max(run.seq, 1)
        await run.bus.connection.publish(
            run.subject, [{"seq": 0, "kind": "accepted"}, {"seq": run.seq, "kind": "heartbeat"}]
        )
        run.seq += 1
        while self.newest_run is run and self.beating:
            await run.publish("heartbeat")
            await asyncio.sleep(0.1)

    async def publish(self, kind: Any, **facts: Any) -> None:
        await until(lambda: self.newest_run, what="it runs")
        assert self.newest_run is not None
        call = {"call": 1} if kind == "waiting" else {}
        await self.newest_run.publish(kind, **{**call, **facts})

    def answers(self) -> list[TaskResult]:
        return [answer for run in self.runs for answer in run.request.answers]

    async def answer(self) -> TaskResult:
        await until(self.answers, within_s=20, what="an answer")
        return self.answers()[0]


async def host(stage: Stage) -> Delegating:
    one = Delegating(await stage.connect("node"), "h1")
    one.run = one.work
    return await one.start()


async def given(stage: Stage, **facts: Any) -> Envelope:
    about = {name: facts.pop(name) for name in list(facts) if name in Envelope.__struct_fields__}
    env = awarded(envelope(ad(**{"task_id": "t1", **facts}), now=stage.bus.clock.now(), **about))
    await stage.record(env)
    await stage.put("execute", env)
    return env


async def end(stage: Stage, child: Envelope, state: Any = "succeeded", *, notify: bool = True, **facts: Any) -> None:
    """End the delegated task as EVALUATE does."""
    await stage.record(replace(child, **facts), state=state, ended_at=stage.bus.clock.now())
    if notify:
        done = (await stage.read(child.task_id)).to_result()
        await stage.bus.connection.publish(stage.bus.subjects.of("result", "public", child.task_id), done)


async def finish(stage: Stage, one: Delegating) -> Envelope:
    await one.publish("resumed", task_id=CHILD)
    await one.publish("result", result=RunResult(content="done", prompt_tokens=30))
    done: Envelope = await stage.seen("task", phase="evaluate", within_s=20)
    return done


async def test_delegated_work_becomes_a_task_and_its_end_is_sent_to_the_run(stage: Stage) -> None:
    one = await host(stage)
    await stage.phase("execute")
    env = await given(stage, priority="high", token_budget=100, budget=80, trace="00-x", limits=Limits(max_depth=2))
    await one.publish("waiting", ad=ad("a part", task_id=CHILD, token_budget=90, context={"k": 1}))
    child: Envelope = await stage.seen("task", phase="sense", task_id=CHILD)
    assert child.split == Split(parent=env.task_id, depth=1, grant=80, deadline=env.deadline)
    assert (child.ad.description, child.ad.context, child.priority) == ("a part", {"k": 1}, "high")
    assert (child.deadline, child.budget, child.ad.limits, child.trace) == (env.deadline, 80, env.ad.limits, "00-x")
    assert (await stage.read(env.task_id)).delegated == (CHILD,)
    await end(stage, child, result=RunResult(content="four", prompt_tokens=5, completion_tokens=6))
    answer = await one.answer()
    assert (answer.task_id, answer.content, answer.prompt_tokens, answer.completion_tokens) == (CHILD, "four", 5, 6)
    asked = next(run.request for run in one.runs if run.request.answers)
    assert asked.from_seq > 1
    first = one.runs[0].request
    assert [(each.call, each.task_id) for each in asked.delegated] == [(1, CHILD)]
    same = replace(asked, answers=(), delegated=(), from_seq=0)
    assert replace(same, remaining_s=first.remaining_s, sent_at=first.sent_at) == first
    done = await finish(stage, one)
    assert (done.error, done.budget) == (None, 50)
    assert (await stage.read(env.task_id)).delegated == (CHILD,)
    assert len(stage.all("task", phase="sense")) == 1


@pytest.mark.slow
async def test_an_end_without_a_notice_is_found_and_a_lost_answer_repeated(
    stage: Stage,
) -> None:
    stage.timings = ServiceTimings(execute=ExecuteTimings(silence_s=1.5, poll_record_s=0.2))
    one = await host(stage)
    await stage.phase("execute")
    await given(stage)
    await one.publish("waiting", ad=ad("a part", task_id=CHILD))
    child = await stage.seen("task", phase="sense", task_id=CHILD)
    await end(stage, child, "failed", notify=False, error=TaskError(code="no_bids", message="no node"))
    answer = await one.answer()
    assert (answer.state, answer.error) == ("failed", TaskError(code="no_bids", message="no node"))
    await until(lambda: len(one.answers()) >= 3, what="the answer is repeated until the run has it")
    await one.publish("resumed", task_id=CHILD)
    await quiet(stage.bus, one.bus)
    published = len(one.answers())
    beats = one.newest_run.seq if one.newest_run else 0
    await until(lambda: one.newest_run and one.newest_run.seq > beats + 3, what="more heartbeats")
    assert len(one.answers()) <= published + 1
    assert (await finish(stage, one)).error is None


@pytest.mark.parametrize(
    ("facts", "asked", "expected"),
    [
        ({"split": Split(parent="p", depth=2, deadline=0)}, {}, "3 deep, and max_depth is 2"),
        ({"limits": Limits(max_depth=0)}, {}, "1 deep, and max_depth is 0"),
        ({}, {"description": ""}, "description is empty"),
        ({"budget": 0}, {}, "no tokens are left"),
    ],
)
async def test_a_delegation_that_is_not_allowed_is_answered_at_once(
    stage: Stage, facts: dict[str, Any], asked: dict[str, Any], expected: str
) -> None:
    one = await host(stage)
    await stage.phase("execute")
    env = await given(stage, **facts)
    await one.publish("waiting", ad=ad(**{"description": "a part", "task_id": CHILD, **asked}))
    answer = await one.answer()
    assert answer.error is not None
    assert (answer.state, answer.error.code) == ("failed", "invalid_task")
    assert expected in answer.error.message
    assert (await finish(stage, one)).error is None
    assert not stage.all("task", phase="sense")
    assert (await stage.read(env.task_id)).delegated == ()


async def test_an_id_that_names_another_task_gets_no_answer_of_it(stage: Stage) -> None:
    one = await host(stage)
    await stage.phase("execute")
    other = envelope(ad("a secret", task_id=CHILD), now=stage.bus.clock.now(), result=RunResult(content="secret"))
    await stage.record(other, state="succeeded", ended_at=1.0)
    await given(stage)
    await one.publish("waiting", ad=ad("a part", task_id=CHILD))
    answer = await one.answer()
    assert (answer.content, answer.error and answer.error.message) == ("", "the id names another task")


async def test_a_waiting_run_holds_no_slot_of_this_phase(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loom.phases.execute.service.SLOTS", 1)
    one = await host(stage)
    await FakeHost(await stage.connect("node"), "h2", run=FakeRun.succeed).start()
    execute: Any = await stage.phase("execute")
    (slots,) = execute.service._loop._slots.values()
    await given(stage)
    await one.publish("waiting", ad=ad("a part", task_id=CHILD))
    second = awarded(envelope(ad(task_id="second"), now=stage.bus.clock.now()), host_id="h2")
    await stage.record(second)
    await stage.put("execute", second)
    await stage.seen("task", phase="evaluate", task_id="second", within_s=20)
    child = await stage.seen("task", phase="sense", task_id=CHILD)
    await end(stage, child, result=RunResult(content="four"))
    await one.answer()
    await one.publish("resumed", task_id=CHILD)
    await until(lambda: slots.taken == 1, what="it has its slot back")
    await one.publish("result", result=RunResult(content="done"))
    await until(lambda: slots.taken == 0, what="its slot is free")


@pytest.mark.slow
async def test_another_replica_finds_the_awaited_subtask_and_sends_its_end(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await host(stage)
    leaving = await stage.phase("execute")
    env = await given(stage)
    waiting = ad("a part", task_id=CHILD)
    await one.publish("waiting", ad=waiting)
    child = await stage.seen("task", phase="sense", task_id=CHILD)
    first = one.newest_run
    await leaving.service.drain(0)
    await stage.phase("execute")
    await until(lambda: one.newest_run is not first, within_s=20, what="it is watched by another")
    await one.publish("waiting", ad=waiting)  # a host repeats its stored events like this
    await end(stage, child, result=RunResult(content="four"))
    assert (await one.answer()).content == "four"
    assert (await finish(stage, one)).error is None
    assert (await stage.read(env.task_id)).delegated == (CHILD,)
    assert not stage.all("cancel")


@pytest.mark.slow
@pytest.mark.parametrize("why", ["cancelled", "given up", "host lost", "late", "ended before"])
async def test_delegated_work_that_no_run_waits_for_is_cancelled(stage: Stage, why: str) -> None:
    one = await host(stage)
    await stage.phase("sense")
    await stage.phase("execute")
    env = await given(stage, token_budget=100, **({"deadline": stage.bus.clock.now() + 2} if why == "late" else {}))
    await one.publish("waiting", ad=ad("a part", task_id=CHILD))
    await stage.seen("task", phase="match", task_id=CHILD, within_s=20)
    if why == "cancelled":
        await stage.bus.requests.request(stage.bus.subjects.of("cancel", env.task_id), timeout_s=20)
    elif why == "given up":
        await one.publish("resumed", task_id=CHILD)
        await one.publish("result", result=RunResult(content="without it"))
        assert (await stage.seen("task", phase="evaluate", task_id=env.task_id, within_s=20)).error is None
    elif why == "host lost":
        one.beating = False
    elif why == "ended before":
        await one.publish("error", error=TaskError(code="agent_failed", message="enough"))
    await stage.seen("cancel", task_id=CHILD, within_s=20)
    await until(lambda: ended(stage, CHILD), within_s=20, what="it is cancelled")


async def ended(stage: Stage, task_id: str) -> bool:
    return (await stage.read(task_id)).state == "cancelled"


async def test_a_message_of_an_ended_task_cancels_the_delegations_of_its_run(stage: Stage) -> None:
    """EXECUTE was not running when the cancel was published."""
    env = awarded(envelope(now=stage.bus.clock.now()))
    await stage.record(env, state="cancelled", ended_at=1.0, delegated=(CHILD, "not-admitted"))
    child = envelope(ad(task_id=CHILD), now=stage.bus.clock.now(), split=Split(parent=env.task_id, depth=1, deadline=0))
    await stage.record(child)
    await stage.phase("sense")
    await stage.phase("execute")
    await stage.put("execute", env)
    await until(lambda: ended(stage, CHILD), what="it is cancelled")
    await stage.settled(phase="execute")


@pytest.mark.slow
async def test_tokens_spent_for_a_lost_run_are_counted(stage: Stage) -> None:
    one = await host(stage)
    await stage.phase("execute")
    await given(stage, token_budget=100)
    await one.publish("waiting", ad=ad("a part", task_id=CHILD))
    child = await stage.seen("task", phase="sense", task_id=CHILD)
    await end(stage, child, result=RunResult(content="four", prompt_tokens=15, completion_tokens=5))
    await one.answer()
    one.beating = False
    lost: Envelope = await stage.seen("task", phase="evaluate", within_s=20)
    assert lost.error is not None
    assert (lost.error.code, lost.budget) == ("node_lost", 80)


@pytest.mark.slow
async def test_a_replica_that_was_overtaken_sends_no_answer(stage: Stage) -> None:
    one = await host(stage)
    await stage.phase("execute")
    env = await given(stage)
    await one.publish("waiting", ad=ad("a part", task_id=CHILD))
    child = await stage.seen("task", phase="sense", task_id=CHILD)

    def overtake(record: TaskRecord) -> TaskRecord:
        return replace(record, claim=Claim(**{**_fields(record.claim), "instance": "another"}))

    await records(stage.bus).update_with(env.task_id, overtake)
    await end(stage, child, result=RunResult(content="four"))
    beats = one.newest_run.seq if one.newest_run else 0
    await until(lambda: one.newest_run and one.newest_run.seq > beats + 5, what="half a second")
    assert not one.answers()


def _fields(claim: Claim) -> dict[str, Any]:
    return {name: getattr(claim, name) for name in Claim.__struct_fields__}


# -- delegations that are refused


async def victim(stage: Stage, task_id: str, **facts: Any) -> None:
    await stage.record(envelope(ad(task_id=task_id), now=stage.bus.clock.now(), **facts))


async def test_an_id_that_a_host_sends_is_ignored_and_its_task_left_alone(stage: Stage) -> None:
    one = await host(stage)
    await victim(stage, "victim")
    await stage.phase("execute")
    env = await given(stage)
    await one.publish("waiting", ad=ad("a part", task_id="victim"), call=3)
    own = delegated_id("t1", 1, 3)
    child = await stage.seen("task", phase="sense", task_id=own)
    await one.publish("resumed", task_id="victim")
    await end(stage, child, result=RunResult(content="four"))
    assert (await one.answer()).task_id == own
    await one.publish("resumed", task_id=own)
    await one.publish("result", result=RunResult(content="done"))
    await stage.seen("task", phase="evaluate", within_s=20)
    await quiet(stage.bus, one.bus)
    assert not stage.all("cancel")
    assert not stage.all("task", phase="sense", task_id="victim")
    assert (await stage.read(env.task_id)).delegated == (own,)


async def test_delegations_are_numbered_from_1(stage: Stage) -> None:
    one = await host(stage)
    await stage.phase("execute")
    await given(stage)
    await one.publish("waiting", ad=ad("a part"), call=0)
    answer = await one.answer()
    assert (answer.task_id, answer.error and answer.error.code) == (delegated_id("t1", 1, 0), "invalid_task")
    assert not stage.all("task", phase="sense")


async def test_a_run_gets_the_id_of_its_delegation_at_once_and_nothing_moves(stage: Stage) -> None:
    one = await host(stage)
    await stage.phase("execute")
    env = await given(stage, labels={"team": "x"})
    await one.publish("waiting", ad=ad("a part"), call=2)
    await until(lambda: len(one.runs) == 2, what="it is sent the id")
    sent = one.runs[1].request
    assert [(each.call, each.task_id) for each in sent.delegated] == [(2, delegated_id("t1", 1, 2))]
    assert (sent.answers, one.runs[0].subject) == ((), one.runs[1].subject)
    child = await stage.seen("task", phase="sense", task_id=delegated_id("t1", 1, 2))
    assert (child.submitter, child.ad.labels) == (env.submitter, {"team": "x"})


@pytest.mark.parametrize("parent", [None, "another"])
@pytest.mark.parametrize("ends", ["resumed", "error"])
async def test_a_task_under_a_derived_id_is_cancelled_only_by_its_parent(
    stage: Stage, parent: str | None, ends: str
) -> None:
    split = Split(parent=parent, depth=1, deadline=0) if parent else None
    one = await host(stage)
    await victim(stage, CHILD, split=split)
    await stage.phase("execute")
    await given(stage)
    await one.publish("waiting", ad=ad("a part", task_id=CHILD))
    await stage.seen("task", phase="sense", task_id=CHILD)
    if ends == "resumed":
        await one.publish("resumed", task_id=CHILD)
    await one.publish("error", error=TaskError(code="agent_failed", message="enough"))
    await stage.seen("task", phase="evaluate", within_s=20)
    await quiet(stage.bus, one.bus)
    assert not stage.all("cancel")


async def test_delegations_beyond_those_a_run_may_have_open_are_refused(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loom.phases.execute.delegation.MAX_OPEN_DELEGATIONS", 3)
    one = await host(stage)
    await stage.phase("execute")
    env = await given(stage)
    ids = [delegated_id("t1", 1, call) for call in range(1, 7)]
    for call, task_id in enumerate(ids, 1):
        await one.publish("waiting", ad=ad("a part", task_id=task_id), call=call)
    await until(lambda: len(one.answers()) >= 3, what="three refusals")
    refused = {answer.task_id: answer.error and answer.error.code for answer in one.answers()}
    assert refused == dict.fromkeys(ids[3:], "overloaded")
    assert len({child.task_id for child in [await stage.seen("task", phase="sense", task_id=i) for i in ids[:3]]}) == 3
    assert len(stage.all("task", phase="sense")) == 3
    assert (await stage.read(env.task_id)).delegated == tuple(ids[:3])
    await one.publish("resumed", task_id=ids[0])
    await one.publish("waiting", ad=ad("a part", task_id=ids[5]), call=6)
    await stage.seen("task", phase="sense", task_id=ids[5])


@pytest.mark.parametrize("failed", [True, False])
async def test_a_failed_delegation_counts_only_where_a_subtask_has_failed(stage: Stage, failed: bool) -> None:
    one = await host(stage)
    await stage.phase("execute")
    await given(stage)
    await one.publish("waiting", ad=ad("a part", task_id=CHILD))
    child = await stage.seen("task", phase="sense", task_id=CHILD)
    await end(stage, child, "failed" if failed else "succeeded", result=RunResult(content="four"))
    await one.answer()
    await one.publish("resumed", task_id=CHILD)
    await one.publish("error", error=TaskError(code="subtask_failed", message="it did not work"))
    error = (await stage.seen("task", phase="evaluate", within_s=20)).error
    assert (error.code, error.message) == ("subtask_failed" if failed else "agent_failed", "it did not work")


async def test_work_given_up_before_its_admission_is_cancelled_after_it(stage: Stage) -> None:
    one = await host(stage)
    await stage.phase("execute")
    await given(stage)
    await one.publish("waiting", ad=ad("a part", task_id=CHILD), call=1)
    child = await stage.seen("task", phase="sense", task_id=CHILD)
    await one.publish("resumed", task_id=CHILD)
    await one.bus.requests.flush()
    assert not stage.all("cancel")
    await stage.record(child)  # as SENSE does
    await stage.seen("cancel", task_id=CHILD)


async def test_a_run_delegates_as_many_tasks_as_its_record_remembers() -> None:
    def refused(call: int) -> str:
        error = refusal(call, 0)
        return error.code if error else ""

    assert [refused(call) for call in (0, 1, MAX_DELEGATED, MAX_DELEGATED + 1)] == [
        "invalid_task",
        "",
        "",
        "overloaded",
    ]


async def test_a_wrong_number_is_not_a_failed_delegation(stage: Stage) -> None:
    one = await host(stage)
    await stage.phase("execute")
    await given(stage)
    await one.publish("waiting", ad=ad("a part"), call=0)
    await one.answer()
    await one.publish("error", error=TaskError(code="subtask_failed", message="by the host"))
    failed: Envelope = await stage.seen("task", phase="evaluate", within_s=20)
    assert failed.error is not None
    assert failed.error.code == "agent_failed"
