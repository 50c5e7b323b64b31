import asyncio
from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import ad, envelope, submission
from support.phase_harness import Asker, Stage, quiet
from support.wait import until

from loom.bus.hops.hop_loop import schedule
from loom.phases.sense.timings import SenseTimings
from loom.runner.timings import ServiceTimings
from loom.schemas.base import encode, new_id
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Claim, Split
from loom.schemas.llm import CompletionParams, CompletionResult
from loom.schemas.record import TaskRecord, TaskStatus
from loom.schemas.task import Accept, Accepted, RunResult, Submission, TaskAd, TaskResult


class Model:
    """A provider that returns or raises the given answer."""

    def __init__(self, answer: str | Exception) -> None:
        self.answer = answer
        self.asked: list[CompletionParams] = []

    async def complete(self, params: CompletionParams) -> CompletionResult:
        self.asked.append(params)
        if isinstance(self.answer, Exception):
            raise self.answer
        return CompletionResult(content=self.answer)

    def stream(self, params: CompletionParams) -> Any:
        raise NotImplementedError


async def submit(stage: Stage, task: TaskAd, **facts: Any) -> Submission:
    sent = submission(task, **facts)
    await stage.bus.jetstream.publish(
        stage.bus.subjects.intake("public", task.priority, task.task_id), sent, msg_id=sent.submission
    )
    return sent


async def end(stage: Stage, task: TaskAd) -> TaskRecord:
    """Store the record of a task that has succeeded."""
    done = envelope(task, now=stage.bus.clock.now(), result=RunResult(content="42"))
    return await stage.record(done, state="succeeded", ended_at=stage.bus.clock.now())


# -- admission


async def test_a_submission_becomes_a_record_and_a_hop_to_match(stage: Stage) -> None:
    await stage.phase("sense")
    before = stage.bus.clock.now()
    task = ad(timeout_s=20, token_budget=500)
    sent = await submit(stage, task, reply_to="_INBOX.client")
    hop = await stage.seen("task", phase="match")
    assert (hop.ad, hop.attempt, hop.step, hop.budget) == (task, 1, 1, 500)
    assert (hop.spec.method, hop.spec.domains, hop.spec.complexity) == ("given", ("code",), 0.3)
    assert [(one.phase, one.step) for one in hop.hops] == [("sense", 0)]
    record = await stage.read(task.task_id)
    assert (record.state, record.submission, record.reply_to) == ("running", sent.submission, ("_INBOX.client",))
    assert record.claim == Claim()
    assert before + 19 < record.envelope.deadline == hop.deadline < stage.bus.clock.now() + 20.5
    await stage.settled("INTAKE")


async def test_the_deadline_counts_from_when_the_server_stored_the_submission(stage: Stage) -> None:
    task = ad(timeout_s=0.2)
    await submit(stage, task)
    stored = stage.bus.clock.now()
    await until(lambda: stage.bus.clock.now() > stored + 0.2, what="the task is too old")
    await stage.phase("sense")
    late = await stage.seen("task", phase="evaluate")
    assert late.error.code == "deadline_exceeded"
    assert late.deadline == pytest.approx(stored + 0.2, abs=0.15)
    assert not stage.all("task", phase="match")


async def test_the_callers_trace_travels_with_the_task(stage: Stage) -> None:
    await stage.phase("sense")
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    asker = Asker(stage.bus)
    headers = {"traceparent": trace}
    await stage.bus.connection.publish(stage.bus.subjects.submit, ad(wait=False), reply=asker.inbox, headers=headers)
    assert (await stage.seen("task", phase="match")).trace == trace


async def test_a_task_submitted_twice_is_admitted_once_and_both_are_answered(stage: Stage) -> None:
    await stage.phase("sense")
    task = ad()
    first = await submit(stage, task, reply_to="_INBOX.one")
    await stage.settled("INTAKE")
    await submit(stage, task, reply_to="_INBOX.two")
    await stage.settled("INTAKE")
    record = await stage.read(task.task_id)
    assert record.submission == first.submission
    assert record.reply_to == ("_INBOX.one", "_INBOX.two")
    assert len(stage.all("task", phase="match")) == 1


async def test_many_submitters_at_once_are_admitted_once_and_none_is_forgotten(stage: Stage) -> None:
    await stage.phase("sense")
    await stage.phase("sense")
    task = ad()
    askers = [Asker(stage.bus) for _ in range(6)]
    await asyncio.gather(*(submit(stage, task, reply_to=asker.inbox) for asker in askers))
    await stage.settled("INTAKE")
    assert len(stage.all("task", phase="match")) == 1
    assert set((await stage.read(task.task_id)).reply_to) == {asker.inbox for asker in askers}


async def test_the_ninth_submitter_of_a_running_task_is_answered_accepted(stage: Stage) -> None:
    await stage.phase("sense")
    task, ninth = ad(), Asker(stage.bus)
    for n in range(8):
        await submit(stage, task, reply_to=f"_INBOX.{n}")
        await stage.settled("INTAKE")
    await submit(stage, task, reply_to=ninth.inbox)
    assert await ninth.answer(Accepted) == Accepted(task_id=task.task_id)
    assert (await stage.read(task.task_id)).reply_to == tuple(f"_INBOX.{n}" for n in range(8))


async def test_the_submitter_of_a_task_that_has_ended_gets_its_answer_at_once(stage: Stage) -> None:
    await stage.phase("sense")
    task, late = ad(), Asker(stage.bus)
    await end(stage, task)
    await late.ask(stage.bus.subjects.submit, task)
    assert (await late.answer(TaskResult)).content == "42"
    assert (await stage.seen("result")).content == "42"
    assert not stage.all("task", phase="match")


async def test_an_own_submission_delivered_again_carries_on(stage: Stage) -> None:
    """As after a crash between the record and the hop."""
    task = ad()
    sent = submission(task)
    admitted = envelope(task, now=stage.bus.clock.now(), spec=None)
    await stage.record(admitted, submission=sent.submission)
    await stage.bus.jetstream.publish(stage.bus.subjects.intake("public", task.priority, task.task_id), sent)
    await stage.phase("sense")
    assert (await stage.seen("task", phase="match")).step == 1


@pytest.mark.parametrize("reply_to", ["t.cancel.abc", "$JS.API.STREAM.DELETE.LOOM_TASKS", "_INBOX"])
async def test_an_answer_is_never_sent_outside_client_inboxes(stage: Stage, reply_to: str) -> None:
    await stage.phase("sense")
    hijacked: list[Any] = []

    async def record(msg: Any) -> None:
        hijacked.append(msg)

    await stage.bus.connection.subscribe(reply_to, record)
    task, done = ad(), ad()
    await submit(stage, task, reply_to=reply_to)
    await end(stage, done)
    await submit(stage, done, reply_to=reply_to)
    await stage.seen("result", task_id=done.task_id)
    await stage.settled("INTAKE")
    assert (await stage.read(task.task_id)).reply_to == ()
    assert not hijacked


# -- refusals


async def test_a_bad_ad_is_refused_at_submission_and_nothing_is_queued(stage: Stage) -> None:
    await stage.phase("sense")
    asker = Asker(stage.bus)
    for count, body in enumerate((b"{", b'{"description": ""}', b'{"description": "x", "prioritty": "low"}'), start=1):
        await asker.ask(stage.bus.subjects.submit, body)
        assert (await asker.error(count=count)).code == "invalid_task"
    assert not stage.all("intake")
    await asker.ask(stage.bus.subjects.submit, ad(wait=False))
    assert (await asker.answer(Accepted, count=4)).state == "accepted"


async def test_an_ad_that_accepts_nothing_at_all_is_refused(stage: Stage) -> None:
    await stage.phase("sense")
    await stage.phase("evaluate")
    asker, straight = Asker(stage.bus), Asker(stage.bus)
    await asker.ask(stage.bus.subjects.submit, ad(accept=Accept(pattern="(")))
    await submit(stage, ad(accept=Accept(json_schema={"type": "nonsense"})), reply_to=straight.inbox)
    for error in (await asker.error(), await straight.failure()):
        assert (error.code, error.field) == ("invalid_task", "accept")


async def test_a_bad_ad_stored_directly_in_the_intake_ends_with_reply_and_record(stage: Stage) -> None:
    await stage.phase("sense")
    await stage.phase("evaluate")
    task, asker = ad(description="  "), Asker(stage.bus)
    await submit(stage, task, reply_to=asker.inbox)
    error = await asker.failure()
    assert (error.code, error.field) == ("invalid_task", "description")
    assert (await stage.read(task.task_id)).state == "failed"


async def test_a_subject_that_names_another_task_is_a_dead_letter_and_harms_no_task(stage: Stage) -> None:
    await stage.phase("sense")
    victim = ad()
    await stage.record(envelope(victim, now=stage.bus.clock.now()))
    await stage.bus.jetstream.publish(
        stage.bus.subjects.intake("public", "normal", victim.task_id), submission(ad(task_id="other"))
    )
    await stage.seen("dead", phase="sense", task_id=victim.task_id)
    await stage.settled("INTAKE")
    assert not stage.all("task")
    assert (await stage.read(victim.task_id)).state == "running"


async def test_bytes_that_are_not_a_submission_end_as_dead_letter(stage: Stage) -> None:
    await stage.phase("sense")
    await stage.phase("evaluate")
    await stage.bus.jetstream.publish(stage.bus.subjects.intake("public", "normal", "t1"), b'{"ad": 7}')
    assert (await stage.seen("result", task_id="t1")).error.code == "dead_letter"
    assert await stage.pending("DEAD") == 1


# -- complexity and domain


async def test_a_model_is_asked_when_the_ad_has_little_text(stage: Stage) -> None:
    model = Model('{"complexity": 0.8, "domains": ["law", "finance"]}')
    await stage.phase("sense", llm=model)
    await submit(stage, ad("Have a look at this, please", domain="", estimated_complexity=None))
    spec = (await stage.seen("task", phase="match")).spec
    assert (spec.method, spec.complexity, spec.domains, spec.note) == ("llm", 0.8, ("law", "finance"), "")
    assert model.asked[0].json_schema is not None
    assert model.asked[0].temperature == 0


async def test_a_model_does_not_change_fields_that_the_ad_sets(stage: Stage) -> None:
    model = Model('{"complexity": 0.8, "domains": ["law"]}')
    await stage.phase("sense", llm=model)
    await submit(stage, ad("Have a look", domain="", estimated_complexity=0.1))
    assert (await stage.seen("task", phase="match")).spec.complexity == 0.1
    await submit(stage, ad("Have a look", domain="cooking", estimated_complexity=None))
    assert (await stage.seen("task", phase="match", count=2)).spec.domains == ("cooking",)
    assert len(model.asked) == 1


@pytest.mark.parametrize("answer", [RuntimeError("no key"), "I cannot tell", '{"complexity": 7, "domains": ["x"]}'])
async def test_a_model_that_fails_is_replaced_by_the_heuristic_and_a_note(
    stage: Stage, answer: str | Exception
) -> None:
    await stage.phase("sense", llm=Model(answer))
    await submit(stage, ad("Have a look", domain="", estimated_complexity=None))
    spec = (await stage.seen("task", phase="match")).spec
    assert (spec.method, spec.domains) == ("heuristic", ("general",))
    assert "could not be asked" in spec.note
    assert "no key" not in spec.note


async def test_the_tokens_of_an_estimate_are_counted_and_subtracted_from_the_budget(stage: Stage) -> None:
    await stage.phase("sense", llm=Model('{"complexity": "0.8", "domains": ["law"]}'))
    await submit(stage, ad("Have a look", domain="", estimated_complexity=None, token_budget=5000))
    envelope = await stage.seen("task", phase="match")
    usage = envelope.phase_usage["sense"]
    assert (usage.requests, usage.estimated, envelope.spec.complexity) == (1, True, 0.8)
    assert envelope.budget == 5000 - usage.tokens


async def test_a_budget_too_small_for_a_question_leaves_it_to_the_heuristic(stage: Stage) -> None:
    model = Model('{"complexity": 0.8, "domains": ["law"]}')
    await stage.phase("sense", llm=model)
    await submit(stage, ad("Have a look", domain="", estimated_complexity=None, token_budget=200))
    envelope = await stage.seen("task", phase="match")
    assert (envelope.spec.method, envelope.budget, model.asked) == ("heuristic", 200, [])
    assert "the token budget does not allow it" in envelope.spec.note


async def test_a_model_that_is_down_does_not_keep_every_vague_task_waiting(stage: Stage) -> None:
    model = Model(ConnectionRefusedError())
    await stage.phase("sense", llm=model)
    for count in range(1, 6):
        await submit(stage, ad("Have a look", domain="", estimated_complexity=None))
        spec = (await stage.seen("task", phase="match", count=count)).spec
        assert spec.method == "heuristic"
    assert len(model.asked) == 3
    assert "not asked for a while" in spec.note


async def test_a_model_that_hangs_is_not_waited_for(stage: Stage) -> None:
    class Hanging(Model):
        async def complete(self, params: CompletionParams) -> CompletionResult:
            await asyncio.Event().wait()
            raise AssertionError(params)

    stage.timings = ServiceTimings(sense=SenseTimings(estimate_within_s=0.05))
    await stage.phase("sense", llm=Hanging(""))
    await submit(stage, ad("Have a look", domain="", estimated_complexity=None))
    assert "TimeoutError" in (await stage.seen("task", phase="match")).spec.note


async def test_chinese_ads_are_understood(stage: Stage) -> None:
    await stage.phase("sense")
    await submit(stage, ad("实现排序算法", domain="", estimated_complexity=None))
    assert (await stage.seen("task", phase="match")).domain == "code"
    await submit(stage, ad("分析", domain="数据"))
    hop = await stage.seen("task", phase="match", count=2)
    assert hop.domain == "数据"
    assert hop.domain_token.startswith("x-")


# -- subtasks


async def subtask(stage: Stage, *, parent_ended: bool) -> Any:
    parent = envelope(ad(task_id="parent"), now=stage.bus.clock.now())
    facts: dict[str, Any] = {"state": "cancelled", "ended_at": 1.0} if parent_ended else {}
    await stage.record(parent, **facts)
    split = Split(parent="parent", depth=1, deadline=parent.deadline, grant=100)
    child = envelope(ad(task_id="child"), now=stage.bus.clock.now(), spec=None, split=split)
    await stage.put("sense", child)
    return child


async def test_a_subtask_is_admitted_like_a_task(stage: Stage) -> None:
    await stage.phase("sense")
    child = await subtask(stage, parent_ended=False)
    hop = await stage.seen("task", phase="match")
    assert (hop.split, hop.depth, hop.deadline) == (child.split, 1, child.deadline)
    assert (await stage.read("child")).state == "running"


async def test_sense_and_its_settings_decide_whether_a_task_is_divided(stage: Stage) -> None:
    await stage.phase("sense", ClusterConfig(mitosis_threshold=0.4, max_depth=3))
    for count, (complexity, divide) in enumerate([(0.4, False), (0.5, True)], 1):
        await submit(stage, ad(estimated_complexity=complexity))
        spec = (await stage.seen("task", phase="match", count=count)).spec
        assert (spec.divide, spec.deepest, spec.whole) == (divide, 3, False)


async def test_a_subtask_too_deep_to_be_divided_has_a_note_of_it(stage: Stage) -> None:
    await stage.phase("sense", ClusterConfig(max_depth=1))
    parent = await stage.record(envelope(ad(task_id="parent"), now=stage.bus.clock.now()))
    split = Split(parent="parent", depth=1, deadline=parent.envelope.deadline)
    task = ad(task_id="child", context={"plan": True})
    await stage.put("sense", envelope(task, now=stage.bus.clock.now(), spec=None, split=split))
    spec = (await stage.seen("task", phase="match")).spec
    assert (spec.divide, spec.deepest) == (True, 1)
    assert spec.note == "not divided: at most 1 divisions deep are allowed"


async def test_a_subtask_of_an_ended_parent_ends_at_once(stage: Stage) -> None:
    await stage.phase("sense")
    await subtask(stage, parent_ended=True)
    assert (await stage.seen("task", phase="evaluate")).error.code == "cancelled"


async def test_an_envelope_that_is_not_a_subtask_is_a_dead_letter(stage: Stage) -> None:
    await stage.phase("sense")
    await stage.put("sense", envelope(now=stage.bus.clock.now()))
    await stage.seen("dead", phase="sense")


# -- status and cancel


async def test_the_status_has_the_phase_and_state_of_a_task(stage: Stage) -> None:
    asker, status = Asker(stage.bus), stage.bus.subjects
    task = ad()
    await stage.put("match", envelope(now=stage.bus.clock.now()))
    await stage.phase("sense", ClusterConfig(max_in_flight=1))  # admits nothing more
    await stage.gate_measured()
    await submit(stage, task)
    await asker.ask(status.of("status", task.task_id))
    assert await asker.answer(Accepted) == Accepted(task_id=task.task_id)
    await asker.ask(status.of("status", "nobodys"))
    assert (await asker.error(count=2)).code == "unknown_task"
    running = await stage.record(envelope(ad(task_id="runs"), now=stage.bus.clock.now()))
    await asker.ask(status.of("status", "runs"))
    assert await asker.answer(TaskResult, count=3) == running.to_result()
    ended = await end(stage, ad(task_id="ended"))
    await asker.ask(status.of("status", "ended"))
    assert await asker.answer(TaskResult, count=4) == ended.to_result()
    assert all(b'"record"' not in msg.data for msg in asker.answers)


async def test_a_full_status_has_the_record_without_the_subjects_of_replies(stage: Stage) -> None:
    await stage.phase("sense")
    submitter, asker = Asker(stage.bus), Asker(stage.bus)
    env = envelope(ad(task_id="t1"), now=stage.bus.clock.now())
    running = await stage.record(env, reply_to=(submitter.inbox,))
    await asker.ask(stage.bus.subjects.of("status", "t1"), {"full": True})
    status = await asker.answer(TaskStatus)
    assert status.record == replace(running, reply_to=())
    assert TaskResult(**{name: getattr(status, name) for name in TaskResult.__struct_fields__}) == running.to_result()
    assert submitter.inbox.encode() not in asker.answers[0].data
    await asker.ask(stage.bus.subjects.of("cancel", "t1"), {"full": True})
    ended = await asker.answer(TaskStatus, count=2)
    assert (ended.state, ended.record) == ("cancelled", replace(await stage.read("t1"), reply_to=()))


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"full": false}', b'{"full": null}', b"please", b'{"full": 7}', b"\xff"]
)
async def test_any_other_body_of_a_request_for_the_status_asks_for_the_result_alone(stage: Stage, body: bytes) -> None:
    await stage.phase("sense")
    asker = Asker(stage.bus)
    running = await stage.record(envelope(ad(task_id="t1"), now=stage.bus.clock.now()))
    await asker.ask(stage.bus.subjects.of("status", "t1"), body)
    assert await asker.answer(TaskResult) == running.to_result()
    assert b'"record"' not in asker.answers[0].data


async def test_a_cancel_of_a_running_task_goes_to_evaluate_first(stage: Stage) -> None:
    await stage.phase("sense")
    asker = Asker(stage.bus)
    await stage.claimed(envelope(ad(task_id="t1"), now=stage.bus.clock.now()), attempt=2)
    await asker.ask(stage.bus.subjects.of("cancel", "t1"))
    result, record = await asker.answer(TaskResult), await stage.read("t1")
    assert (record.state, record.envelope.error and record.envelope.error.code) == ("cancelled", "cancelled")
    assert record.ended_at is not None
    sent = await stage.seen("task", phase="evaluate", task_id="t1")
    assert (sent.error.code, sent.attempt) == ("cancelled", 2)
    assert record.to_result() == result


async def test_a_cancelled_task_has_the_tokens_of_its_failed_attempts(stage: Stage) -> None:
    await stage.phase("sense")
    took = RunResult(prompt_tokens=10, completion_tokens=5, usd=0.5)
    env = envelope(ad(task_id="t1"), now=stage.bus.clock.now(), attempt=2, spent=took, result=took)
    await stage.record(replace(env, spent=RunResult(), result=None, attempt=1))
    await stage.put("execute", env)
    asker = Asker(stage.bus)
    await asker.ask(stage.bus.subjects.of("cancel", "t1"))
    result = await asker.answer(TaskResult)
    assert (result.state, result.prompt_tokens, result.usd) == ("cancelled", 20, 1.0)
    sent = await stage.seen("task", phase="evaluate")
    assert (sent.error.code, sent.spent) == ("cancelled", took.usage_with(took))


async def test_reply_subjects_are_not_shown_to_the_canceller_of_a_task_on_its_way(stage: Stage) -> None:
    await stage.phase("sense")
    submitter, asker = Asker(stage.bus), Asker(stage.bus)
    task = ad(task_id="t1")
    sent = submission(task, reply_to=submitter.inbox)
    await stage.bus.jetstream.publish(stage.bus.subjects.intake("public", "normal", "t1"), sent, msg_id=new_id())
    assert (await stage.seen("task", phase="match")).record_version.reply_to == (submitter.inbox,)
    await asker.ask(stage.bus.subjects.of("cancel", "t1"), {"full": True})
    record = (await asker.answer(TaskStatus)).record
    assert record is not None
    assert (record.state, record.envelope.record_version) == ("cancelled", None)
    assert submitter.inbox not in asker.answers[0].data.decode()
    assert (await stage.read("t1")).envelope.record_version is None


async def test_a_cancel_of_an_ended_task_changes_nothing(stage: Stage) -> None:
    await stage.phase("sense")
    asker = Asker(stage.bus)
    ended = await end(stage, ad(task_id="t1"))
    await asker.ask(stage.bus.subjects.of("cancel", "t1"))
    assert await asker.answer(TaskResult) == ended.to_result()
    assert not stage.all("task")


async def test_a_queued_task_is_cancelled_before_it_is_admitted(stage: Stage) -> None:
    await stage.put("match", envelope(now=stage.bus.clock.now()))
    await stage.phase("sense", ClusterConfig(max_in_flight=1))
    await stage.phase("evaluate")
    await stage.gate_measured()
    task, submitter, asker = ad(), Asker(stage.bus), Asker(stage.bus)
    await submitter.ask(stage.bus.subjects.submit, task)
    await stage.seen("intake", task_id=task.task_id)
    await asker.ask(stage.bus.subjects.of("cancel", task.task_id))
    assert (await asker.answer(TaskResult)).state == "cancelled"
    assert (await submitter.failure()).code == "cancelled"
    await stage.bus.jetstream.api(f"STREAM.PURGE.{stage.bus.subjects.stream('TASKS')}")
    await stage.settled("INTAKE")  # admission finds it ended
    assert not stage.all("task", phase="match", task_id=task.task_id)


async def test_a_cancel_of_an_unknown_task_is_answered_unknown_task(stage: Stage) -> None:
    await stage.phase("sense")
    asker = Asker(stage.bus)
    await asker.ask(stage.bus.subjects.of("cancel", "nobodys"))
    assert (await asker.error()).code == "unknown_task"


@pytest.mark.parametrize("family", ["status", "cancel"])
async def test_a_wildcard_in_a_task_id_matches_no_task(stage: Stage, family: str) -> None:
    await stage.phase("sense")
    asker = Asker(stage.bus)
    await stage.record(envelope(ad(task_id="somebodys"), now=stage.bus.clock.now()))
    await asker.ask(f"{stage.namespace}.{family}.*")
    error = await asker.error()
    assert (error.code, error.field) == ("invalid_task", "task_id")
    assert (await stage.read("somebodys")).state == "running"


# -- the intake gate


async def test_no_task_is_admitted_while_the_stream_is_full(stage: Stage) -> None:
    for n in range(4):
        await stage.put("match", envelope(ad(task_id=f"f{n}"), now=stage.bus.clock.now()))
    await stage.phase("sense", ClusterConfig(max_in_flight=4))
    for n in range(3):
        await submit(stage, ad(task_id=f"w{n}", priority="critical"))
    await stage.gate_measured()
    assert await stage.pending("INTAKE") == 3
    await stage.bus.jetstream.api(f"STREAM.PURGE.{stage.bus.subjects.stream('TASKS')}")
    await stage.seen("task", phase="match", task_id="w2")


async def test_a_fifth_of_the_room_is_kept_for_urgent_tasks(stage: Stage) -> None:
    for n in range(8):
        await stage.put("match", envelope(ad(task_id=f"f{n}"), now=stage.bus.clock.now()))
    await stage.phase("sense", ClusterConfig(max_in_flight=10))
    await submit(stage, ad(task_id="usual"))
    await submit(stage, ad(task_id="urgent", priority="high"))
    await stage.seen("task", phase="match", task_id="urgent")
    await stage.gate_measured()
    assert not stage.all("task", phase="match", task_id="usual")


async def test_parked_timers_take_no_room(stage: Stage) -> None:
    for n in range(8):
        parked = envelope(ad(task_id=f"p{n}"), now=stage.bus.clock.now())
        subjects = stage.bus.subjects
        target = subjects.task("match", "normal", parked.task_id)
        at = stage.bus.clock.now() + 60
        await schedule(
            stage.bus,
            subjects.later("match", parked.task_id, "task-1"),
            target=target,
            at=at,
            message=parked,
            msg_id=f"p{n}",
        )
    await stage.phase("sense", ClusterConfig(max_in_flight=4))
    await submit(stage, ad(task_id="t1"))
    await stage.seen("task", phase="match", task_id="t1")


@pytest.mark.slow
async def test_a_flood_of_tasks_goes_through_a_small_stream(stage: Stage) -> None:
    await stage.phase("sense", ClusterConfig(max_in_flight=5))
    await stage.phase("match")
    for n in range(40):
        await submit(stage, ad(task_id=f"t{n}"))

    async def finish_some() -> bool:
        await stage.bus.jetstream.api(f"STREAM.PURGE.{stage.bus.subjects.stream('TASKS')}")
        return len({hop.task_id for hop in stage.all("task", phase="match")}) == 40

    await until(finish_some, what="all are admitted")


# -- stopping


async def test_two_replicas_share_the_work_and_a_drained_one_takes_none(stage: Stage) -> None:
    one, two = await stage.phase("sense"), await stage.phase("sense")
    await one.service.drain(1)
    for n in range(5):
        await submit(stage, ad(task_id=f"t{n}"))
    await stage.seen("task", phase="match", count=5)
    assert {hop.hops[0].instance for hop in stage.all("task", phase="match")} == {two.bus.instance}
    await one.service.drain(1)


async def test_the_wire_form_of_a_submission_is_plain_json_others_can_write(stage: Stage) -> None:
    await stage.phase("sense")
    body = b'{"ad": {"task_id": "t1", "description": "x", "domain": "code"}, "submission": "s", "new": 1}'
    await stage.bus.jetstream.publish(stage.bus.subjects.intake("public", "normal", "t1"), body)
    assert (await stage.seen("task", phase="match")).ad == TaskAd(task_id="t1", description="x", domain="code")
    await quiet(stage.bus)
    assert encode(replace((await stage.read("t1")).envelope, deadline=0.0)) == encode(
        replace(stage.all("task", phase="match")[0], deadline=0.0, spec=None, record_version=None, step=0, hops=())
    )
