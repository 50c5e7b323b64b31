import asyncio
from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import ad, awarded, envelope
from support.bus_helpers import Connect
from support.phase_harness import Asker, Stage, quiet
from support.wait import until

from loom.bus.topology import EVALUATE_LANE
from loom.phases.evaluate.service import Evaluate
from loom.runner.server.nats_server import NatsServer
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Claim, Envelope, FailedAttempt, Hop, RecordVersion, RejectedResult, Split
from loom.schemas.llm import CompletionParams, CompletionResult
from loom.schemas.notices import ParentEnded, SubtaskEnded
from loom.schemas.plan import SplitPlan, Subtask
from loom.schemas.record import TaskRecord
from loom.schemas.task import Accept, RunResult, TaskError, TaskResult

RAN = Hop(phase="execute", instance="execute-1", started=100.0, finished=200.0)


async def given(stage: Stage, content: str | None = None, code: str | None = None, **facts: Any) -> Envelope:
    """A running task in its claimed attempt, back from EXECUTE with a result or an error."""
    reply_to = facts.pop("reply_to", ())
    claim = facts.pop("claim", facts.get("attempt", 1))
    task = facts.pop("ad", None) or ad(task_id="t1")
    result = None if content is None else RunResult(content=content, completion_tokens=6, duration_s=1.5)
    error = TaskError(code=code, message=f"error {code}", node_id="n1") if code else None
    env = envelope(task, now=stage.bus.clock.now(), result=result, error=error, hops=(RAN,), **facts)
    env = env if "award" in facts else awarded(env)
    await stage.record(replace(env, result=None, error=None), reply_to=reply_to, claim=Claim(attempt=claim))
    await stage.put("evaluate", env)
    return env


# -- ends


async def test_a_success_is_recorded_rewarded_published_and_answered(stage: Stage) -> None:
    one, two = Asker(stage.bus), Asker(stage.bus)
    await stage.phase("evaluate")
    env = await given(stage, "42", reply_to=(one.inbox, two.inbox))
    result = await stage.seen("result")
    assert (result.state, result.content, result.node_id, result.host_id) == ("succeeded", "42", "n1", "h1")
    assert (result.attempts, result.score, result.completion_tokens, result.duration_s) == (1, 1.0, 6, 1.5)
    assert await one.answer(TaskResult) == await two.answer(TaskResult) == result
    await stage.settled()
    record = await stage.read("t1")
    assert (record.state, record.score, record.below_threshold) == ("succeeded", 1.0, False)
    assert record.envelope == env
    assert record.ended_at is not None
    reward = await stage.seen("reward", node_id="n1", domain_token="code")
    assert (reward.reward_id, reward.score, reward.tokens, reward.seconds) == ("t1:1:rules", 1.0, 6, 1.5)
    assert reward.ended_at == record.ended_at


async def test_the_record_and_the_reward_come_before_the_result_and_the_replies(stage: Stage) -> None:
    asker = Asker(stage.bus)
    await stage.phase("evaluate")
    await given(stage, "42", reply_to=(asker.inbox,))
    await asker.answer(TaskResult)
    await stage.seen("result")
    published = [one.parsed.family for one in stage.recorded if one.parsed.family in ("reward", "result")]
    assert published == ["reward", "result"]
    assert (await stage.read("t1")).ended


async def test_a_failure_is_answered_with_its_result_and_as_an_error_everywhere(stage: Stage) -> None:
    one, two = Asker(stage.bus), Asker(stage.bus)
    await stage.phase("evaluate")
    await given(stage, code="budget_exceeded", reply_to=(one.inbox, two.inbox))
    error = await one.failure()
    assert (error.code, error.message) == ("budget_exceeded", "error budget_exceeded")
    assert await two.failure() == error
    result = await stage.seen("result")
    assert await one.answer(TaskResult) == result
    assert (result.state, result.error.code) == ("failed", "budget_exceeded")
    assert (await stage.read("t1")).state == "failed"


@pytest.mark.parametrize(
    "code",
    [
        "no_bids",
        "cancelled",
        "budget_exceeded",
        "invalid_plan",
        "subtask_failed",
        "dead_letter",
        "something_new",
    ],
)
async def test_a_final_code_ends_the_task_without_a_reward(stage: Stage, code: str) -> None:
    await stage.phase("evaluate")
    await given(stage, code=code)
    result = await stage.seen("result")
    assert result.state == ("cancelled" if code == "cancelled" else "failed")
    assert result.error.code == code
    await stage.settled()
    assert not stage.all("reward")


class Judge:
    """A model that returns a given opinion, or raises."""

    def __init__(self, reply: str | Exception) -> None:
        self._reply = reply
        self.asked: list[CompletionParams] = []

    async def complete(self, params: CompletionParams) -> CompletionResult:
        self.asked.append(params)
        if isinstance(self._reply, Exception):
            raise self._reply
        return CompletionResult(content=self._reply)

    def stream(self, params: CompletionParams) -> Any:
        raise NotImplementedError


async def test_a_model_judges_by_the_ads_rubric_and_its_score_is_the_reward(stage: Stage) -> None:
    await stage.phase("evaluate", llm=Judge('{"score": 0.75, "reason": "nearly"}'))
    await given(stage, "an answer", ad=ad(task_id="t1", accept=Accept(rubric="must be complete")))
    assert (await stage.seen("result")).score == 0.75
    assert (await stage.seen("reward", node_id="n1")).score == 0.75


async def test_a_poor_opinion_sends_the_task_to_another_node(stage: Stage) -> None:
    await stage.phase("evaluate", llm=Judge('{"score": 0.2, "reason": "off the point"}'))
    await given(stage, "an answer", ad=ad(task_id="t1", accept=Accept(rubric="must be complete")))
    back = await stage.seen("task", phase="match")
    assert (back.last_error.code, back.best_rejected.score, back.excluded) == ("rejected_result", 0.2, ("n1",))
    assert "off the point" in back.last_error.message
    assert (await stage.seen("reward", node_id="n1")).score == 0.2


@pytest.mark.parametrize("reply", ["no idea", RuntimeError("down, key sk-1")])
async def test_the_rules_decide_without_an_opinion_and_the_result_has_a_warning(
    stage: Stage, reply: str | Exception
) -> None:
    await stage.phase("evaluate", ClusterConfig(judge_share=1.0), Judge(reply))
    await given(stage, "an answer")
    result = await stage.seen("result")
    assert (result.state, result.score) == ("succeeded", None)
    (warning,) = result.warnings
    assert warning.startswith("the judge could not be asked: ")
    assert "sk-1" not in warning
    assert (await stage.seen("reward", node_id="n1")).score == 1.0


@pytest.mark.parametrize("judge", [Judge("no idea"), Judge(RuntimeError("down")), None])
async def test_a_rubric_that_was_not_checked_earns_nothing(stage: Stage, judge: Judge | None) -> None:
    await stage.phase("evaluate", llm=judge)
    env = await given(stage, "an answer", ad=ad(task_id="t1", accept=Accept(rubric="must be complete")))
    result = await stage.seen("result")
    assert (result.state, result.score, result.content) == ("succeeded", None, "an answer")
    assert "its rubric was not checked" in result.warnings[0]
    await stage.put("evaluate", env)  # published again, from the record
    await stage.seen("result", count=2)
    await stage.settled()
    assert not stage.all("reward")


async def test_a_second_request_to_the_judge_has_no_response_format_and_its_tokens_count(stage: Stage) -> None:
    class Late(Judge):
        async def complete(self, params: CompletionParams) -> CompletionResult:
            self._reply = "no idea" if not self.asked else '{"score": "8/10"}'
            return await super().complete(params)

    judge = Late("")
    await stage.phase("evaluate", llm=judge)
    await given(stage, "an answer", budget=5000, ad=ad(task_id="t1", accept=Accept(rubric="must be complete")))
    result = await stage.seen("result")
    assert (result.score, result.warnings) == (0.8, ())
    assert [asked.json_schema is None for asked in judge.asked] == [False, True]
    assert result.usage.phases["evaluate"].requests == 2
    record = await stage.read("t1")
    assert record.envelope.budget == 5000 - result.usage.phases["evaluate"].tokens


# -- a node that calls the ad invalid


async def called_invalid(stage: Stage, **facts: Any) -> Envelope:
    return await given(stage, code="invalid_task", **facts)


async def test_a_first_invalid_task_error_is_retried_elsewhere_without_a_penalty(stage: Stage) -> None:
    await stage.phase("evaluate")
    await called_invalid(stage)
    back = await stage.seen("task", phase="match")
    assert (back.attempt, back.failures, back.excluded) == (2, 1, ("n1",))
    assert [(tried.node_id, tried.code) for tried in back.failed_attempts] == [("n1", "invalid_task")]
    await stage.settled(left=1)
    assert not stage.all("reward")


async def test_a_second_nodes_invalid_task_error_ends_the_task_without_any_reward(stage: Stage) -> None:
    await stage.phase("evaluate")
    tried = (FailedAttempt(attempt=1, node_id="n0", host_id="h0", code="invalid_task", message="no such file"),)
    await called_invalid(stage, attempt=2, failures=1, excluded=("n0",), failed_attempts=tried)
    result = await stage.seen("result")
    assert (result.state, result.error.code, result.error.message) == ("failed", "invalid_task", "error invalid_task")
    await stage.settled()
    assert not stage.all("reward")


async def test_an_invalid_task_error_ends_a_pinned_task_at_once(stage: Stage) -> None:
    await stage.phase("evaluate")
    await called_invalid(stage, ad=ad(task_id="t1", node_id="n1"))
    assert (await stage.seen("result")).error.code == "invalid_task"
    await stage.settled()
    assert not stage.all("reward")


async def test_an_invalid_task_error_ends_the_task_without_another_bidder(stage: Stage) -> None:
    await stage.phase("evaluate")
    word = TaskError(code="invalid_task", message="no such file", field="context", node_id="n0")
    await given(stage, code="no_bids", failures=1, attempt=2, claim=1, award=None, last_error=word)
    assert (await stage.seen("result")).error == word
    await stage.settled()
    assert not stage.all("reward")


async def test_an_ad_that_breaks_a_rule_ends_at_once(stage: Stage) -> None:
    await stage.phase("evaluate")
    env = await given(stage, "42")
    await stage.seen("result")
    fault = TaskError(code="invalid_task", message="description is empty", field="description")
    other = replace(env, ad=ad(task_id="t2"), result=None, error=fault, award=None)
    await stage.record(replace(other, error=None))
    await stage.put("evaluate", other)
    assert (await stage.seen("result", task_id="t2")).error == fault


async def test_another_nodes_success_refutes_the_error_and_repeated_messages_are_one_reward(stage: Stage) -> None:
    await stage.phase("evaluate")
    tried = (
        FailedAttempt(attempt=1, node_id="n0", host_id="h0", code="invalid_task", tokens=3),
        FailedAttempt(attempt=2, node_id="n5", host_id="h5", code="agent_failed"),
    )
    env = await given(stage, "42", attempt=3, failures=2, failed_attempts=tried)
    reward = await stage.seen("reward", node_id="n0")
    assert (reward.reward_id, reward.score, reward.reason, reward.tokens) == ("t1:1:rules", 0.0, "invalid_task", 3)
    assert (await stage.seen("reward", node_id="n1")).score == 1.0
    await stage.put("evaluate", env)
    await stage.seen("result", count=2)
    await stage.settled()
    assert len(set(stage.all("reward"))) == 2
    assert await stage.pending("REWARDS") == 2


# -- tokens


async def test_the_tokens_of_failed_attempts_are_in_the_result_however_the_task_ends(stage: Stage) -> None:
    await stage.phase("evaluate", ClusterConfig(max_attempts=2))
    took = RunResult(prompt_tokens=10, completion_tokens=5, usd=0.25)
    env = await given(stage, code="agent_failed")
    failed = replace(env, ad=ad(task_id="t2"), result=took)
    await stage.record(replace(failed, result=None, error=None), claim=Claim(attempt=1))
    await stage.put("evaluate", failed)
    later = await stage.seen("later", task_id="t2")
    assert (later.spent, later.result) == (took, None)
    last = replace(awarded(later, "n2", "h2"), result=replace(took, estimated_usage=True), error=env.error)
    await stage.put("evaluate", last)
    result = await stage.seen("result", task_id="t2")
    assert (result.state, result.prompt_tokens, result.completion_tokens, result.usd) == ("failed", 20, 10, 0.5)
    assert result.estimated_usage


# -- back to MATCH


@pytest.mark.parametrize("code", ["node_lost", "agent_failed", "rejected_result"])
async def test_a_nodes_failure_sends_the_task_back_with_a_reward_of_zero(stage: Stage, code: str) -> None:
    await stage.phase("evaluate")
    await given(stage, code=code, attempt=2, failures=1, excluded=("n0",))
    back = await (stage.seen("task", phase="match") if code == "rejected_result" else stage.seen("later"))
    assert (back.attempt, back.failures, back.excluded) == (3, 2, ("n0", "n1"))
    assert (back.error, back.result, back.last_error.code) == (None, None, code)
    reward = await stage.seen("reward", node_id="n1")
    assert (reward.reward_id, reward.score, reward.reason) == ("t1:2:rules", 0.0, code)
    assert reward.ended_at == RAN.finished
    assert await until(lambda: stage.pending("TASKS", stage.bus.subjects.task("match", "*", "t1")), what="the call")
    record = await stage.read("t1")
    assert (record.state, record.claim.attempt) == ("running", 2)
    assert not stage.all("result")


async def test_a_node_that_asked_for_a_pause_is_retried_if_no_other_is_left(stage: Stage) -> None:
    await stage.phase("evaluate")
    rested_at = stage.bus.clock.now() + 0.3
    await given(stage, code="no_bids", attempt=2, failures=1, excluded=("n1",), retry_at={"n1": rested_at})
    parked = await stage.seen("later")
    assert (parked.attempt, parked.excluded, parked.retry_at) == (3, (), {})
    await until(lambda: stage.pending("TASKS", stage.bus.subjects.task("match", "*", "t1")), what="the call")
    assert stage.bus.clock.now() >= rested_at


async def test_a_busy_node_costs_nothing(stage: Stage) -> None:
    await stage.phase("evaluate")
    await given(stage, code="node_busy")
    back = await stage.seen("task", phase="match")
    assert (back.attempt, back.failures, back.excluded) == (2, 0, ())
    assert not stage.all("reward")


@pytest.mark.parametrize(("content", "good"), [("the answer is 42", True), ("the answer is 43", False), ("", False)])
async def test_the_accept_rules_of_the_ad_decide(stage: Stage, content: str, good: bool) -> None:
    await stage.phase("evaluate")
    await given(stage, content, ad=ad(task_id="t1", accept=Accept(contains=("answer", "42"))))
    if good:
        assert (await stage.seen("result")).success
    else:
        assert (await stage.seen("task", phase="match")).last_error.code == "rejected_result"


async def test_failures_are_bounded_and_the_last_error_is_the_answer(stage: Stage) -> None:
    await stage.phase("evaluate", ClusterConfig(max_attempts=2))
    await given(stage, code="agent_failed", failures=1, attempt=2)
    result = await stage.seen("result")
    assert (result.error.code, result.attempts) == ("agent_failed", 2)
    assert (await stage.seen("reward")).score == 0
    assert not stage.all("task", phase="match")


NEARLY = RejectedResult(result=RunResult(content="nearly"), score=0.3, reason="too short", node_id="n0", host_id="h0")


async def test_a_task_fails_when_attempts_run_out_and_shows_the_best_refused_answer(stage: Stage) -> None:
    asker = Asker(stage.bus)
    await stage.phase("evaluate", ClusterConfig(max_attempts=2))
    await given(stage, code="agent_failed", failures=1, attempt=2, best_rejected=NEARLY, reply_to=(asker.inbox,))
    refusal = await asker.failure()
    assert (refusal.code, refusal.best_rejected) == ("rejected_result", NEARLY.to_rejected())
    assert "too short (the best refused answer, of n0); the last attempt ended with agent_failed" in refusal.message
    result = await stage.seen("result")
    assert (result.state, result.content, result.below_threshold) == ("failed", "", False)
    assert (result.error.code, result.error.best_rejected) == ("rejected_result", NEARLY.to_rejected())
    assert (await stage.read("t1")).envelope.error.code == "agent_failed"
    reward = await stage.seen("reward")
    assert (reward.node_id, reward.score, reward.reason) == ("n1", 0.0, "agent_failed")


@pytest.mark.parametrize("last", ["no_bids", "node_busy"])
async def test_an_end_without_an_attempt_after_a_refused_answer_rewards_no_node(stage: Stage, last: str) -> None:
    await stage.phase("evaluate")
    own = TaskError(code="rejected_result", message="too short", node_id="n0")
    facts: dict[str, Any] = {"failures": 1, "attempt": 2, "claim": 1, "best_rejected": NEARLY, "last_error": own}
    award = {"award": None} if last == "no_bids" else {"left_s": -1}
    await given(stage, code=last, **facts, **award)
    error = (await stage.seen("result")).error
    assert error.code == ("rejected_result" if last == "no_bids" else "deadline_exceeded")
    assert error.best_rejected.content == "nearly"
    await stage.settled()
    assert not stage.all("reward")


async def test_the_largest_refused_answer_fits_a_message(stage: Stage) -> None:
    asker = Asker(stage.bus)
    largest = replace(NEARLY, result=RunResult(content="\x01" * 10_000), reason="x" * 2000)
    await stage.phase("evaluate", ClusterConfig(max_attempts=2))
    await given(stage, code="agent_failed", failures=1, attempt=2, best_rejected=largest, reply_to=(asker.inbox,))
    assert (await asker.failure()).best_rejected == largest.to_rejected()
    assert (await stage.seen("result")).error.best_rejected == largest.to_rejected()


async def test_an_ad_may_ask_for_the_best_refused_answer(stage: Stage) -> None:
    asker = Asker(stage.bus)
    await stage.phase("evaluate", ClusterConfig(max_attempts=2))
    task = ad(task_id="t1", accept=Accept(best_effort=True))
    facts: dict[str, Any] = {"best_rejected": replace(NEARLY, score=0.0), "reply_to": (asker.inbox,), "ad": task}
    await given(stage, code="agent_failed", failures=1, attempt=2, **facts)
    result = await asker.answer(TaskResult)
    assert (result.state, result.content, result.below_threshold) == ("succeeded", "nearly", True)
    assert (result.node_id, result.host_id, result.score, result.error) == ("n0", "h0", 0.0, None)
    reward = await stage.seen("reward")
    assert (reward.node_id, reward.score) == ("n1", 0.0)


async def test_no_bids_after_failures_ends_with_the_last_attempts_own_error(stage: Stage) -> None:
    await stage.phase("evaluate")
    own = TaskError(code="agent_failed", message="it raised", node_id="n0")
    await given(stage, code="no_bids", failures=1, attempt=2, claim=1, award=None, last_error=own)
    assert (await stage.seen("result")).error == own
    await stage.settled()
    assert not stage.all("reward")


# -- messages that come twice, late, or without a record


async def test_messages_after_the_end_only_have_it_announced_again(stage: Stage) -> None:
    asker = Asker(stage.bus)
    await stage.phase("evaluate")
    env = await given(stage, "42", reply_to=(asker.inbox,))
    first = await asker.answer(TaskResult)
    record = await stage.read("t1")
    for late in (
        env,
        replace(env, result=RunResult(content="43")),
        replace(env, result=None, error=TaskError(code="node_lost")),
        replace(env, result=None, error=TaskError(code="cancelled")),
        replace(env, attempt=7, result=None, error=TaskError(code="agent_failed")),
    ):
        await stage.put("evaluate", late)
    assert await asker.answer(TaskResult, count=6) == first
    await stage.settled()
    assert await stage.read("t1") == record
    assert {result.content for result in stage.all("result")} == {"42"}
    assert not stage.all("task", phase="match")
    assert len(set(stage.all("reward"))) == 1
    assert await stage.pending("REWARDS") == 1


async def test_a_failure_delivered_twice_is_sent_back_once(stage: Stage) -> None:
    await stage.phase("evaluate")
    env = await given(stage, code="agent_failed")
    await stage.put("evaluate", env)
    await stage.settled(phase="evaluate")
    assert await stage.pending("TASKS") == 1  # the one hop to MATCH
    assert await stage.pending("REWARDS") == 1


async def test_a_late_twin_of_a_replaced_attempt_is_dropped(stage: Stage) -> None:
    await stage.phase("evaluate")
    await given(stage, "late", attempt=1, claim=2)
    await stage.settled()
    assert not stage.all("result")
    assert not stage.all("reward")
    assert (await stage.read("t1")).state == "running"


async def test_a_cancel_ends_the_task_even_if_an_attempt_was_claimed_meanwhile(stage: Stage) -> None:
    await stage.phase("evaluate")
    await given(stage, code="cancelled", attempt=1, claim=2)
    assert (await stage.seen("result")).state == "cancelled"
    assert (await stage.read("t1")).state == "cancelled"


@pytest.mark.parametrize("split", [None, Split(parent="p", depth=1, deadline=1e10)])
async def test_a_missing_record_is_made_for_a_task_that_never_reached_admission(
    stage: Stage, split: Split | None
) -> None:
    await stage.phase("evaluate")
    error = TaskError(code="dead_letter", message="sense could not")
    await stage.put("evaluate", envelope(ad(task_id="t1"), now=stage.bus.clock.now(), error=error, split=split))
    assert (await stage.seen("result")).error.code == "dead_letter"
    assert (await stage.read("t1")).state == "failed"


async def test_a_missing_record_of_a_task_on_its_way_stays_missing(stage: Stage) -> None:
    evaluate = await stage.phase("evaluate")
    env = awarded(envelope(ad(task_id="t1"), now=stage.bus.clock.now(), hops=(RAN,), result=RunResult(content="x")))
    await stage.put("evaluate", env)
    await stage.settled()
    await quiet(stage.bus, evaluate.bus)
    assert not stage.all("result")
    with pytest.raises(AssertionError, match="no record"):
        await stage.read("t1")


async def test_a_bad_input_of_evaluate_ends_its_task(stage: Stage) -> None:
    asker = Asker(stage.bus)
    await stage.phase("evaluate")
    await stage.record(
        envelope(ad(task_id="t1"), now=stage.bus.clock.now()), reply_to=(asker.inbox,), claim=Claim(attempt=2)
    )
    await stage.bus.jetstream.publish(stage.bus.subjects.task("evaluate", "normal", "t1"), b'{"ad": 7}')
    assert (await asker.failure()).code == "dead_letter"
    assert (await stage.read("t1")).state == "failed"
    assert await stage.pending("DEAD") == 1


async def test_a_message_delivered_too_often_ends_the_task(stage: Stage) -> None:
    await given(stage, "42", record_version=RecordVersion(revision=1, reply_to=("_INBOX.a.1",), admitted_at=1.0))
    await stage.reject(EVALUATE_LANE, 10)
    await stage.phase("evaluate")
    assert (await stage.seen("result")).error.code == "dead_letter"
    await stage.settled()
    assert (await stage.read("t1")).envelope.record_version is None


async def test_a_stop_does_not_wait_for_a_reward_that_cannot_be_stored(server: NatsServer, connect: Connect) -> None:
    bus = await connect(url=server.url)
    evaluate = Evaluate(bus, ClusterConfig())
    late = TaskError(code="deadline_exceeded", node_id="n1")
    ended = awarded(envelope(ad(task_id="t1"), now=bus.clock.now(), error=late))
    record = TaskRecord(task_id="t1", state="failed", envelope=ended, admitted_at=1.0, ended_at=2.0)
    server.kill()
    await until(lambda: not bus.connection._nc.is_connected, what="the connection is lost")
    announcing = asyncio.ensure_future(evaluate._announce(record))
    await until(lambda: bus.jetstream._publisher._pending, what="the reward is on its way")
    await asyncio.sleep(0)
    announcing.cancel()
    done, _ = await asyncio.wait([announcing], timeout=5)
    assert done


async def test_two_replicas_end_each_task_once(stage: Stage) -> None:
    await stage.phase("evaluate")
    await stage.phase("evaluate")
    asker = Asker(stage.bus)
    for n in range(20):
        await given(stage, "42", ad=ad(task_id=f"t{n}"), reply_to=(asker.inbox,))
    await asker.answer(TaskResult, count=20)
    await stage.settled()
    await quiet(stage.bus)
    assert len(asker.answers) == 20
    assert await stage.pending("REWARDS") == 20


# -- subtasks and divided tasks


PART = Split(parent="p", depth=1, subtask="a", grant=100, deadline=1e10, inputs={"before": "it"})


async def with_plan(stage: Stage, env: Envelope, *parts: Subtask) -> None:
    await stage.bus.bucket("plans", SplitPlan).create(
        env.task_id, SplitPlan(parent_id=env.task_id, subtasks=parts, envelope=env)
    )


def scale_ids(stage: Stage) -> list[str]:
    """The ids of the messages to SCALE."""
    messages = [one for one in stage.recorded if one.parsed.tokens.get("phase") == "scale"]
    return [one.headers["Nats-Msg-Id"] for one in messages]


@pytest.mark.parametrize(("content", "code"), [("42", None), (None, "budget_exceeded"), (None, "cancelled")])
async def test_scale_is_notified_of_a_subtasks_end_however_it_ended(
    stage: Stage, content: str | None, code: str | None
) -> None:
    await stage.phase("evaluate")
    await given(stage, content, code, split=PART, ad=ad(task_id="t1", priority="high"))
    notice = await stage.seen("task", phase="scale")
    assert notice == SubtaskEnded(task_id="p", child_id="t1", subtask="a")
    assert stage.all("task", phase="scale", priority="high", task_id="p") == [notice]
    assert scale_ids(stage) == ["t1:done"]
    assert (await stage.read("t1")).ended


async def test_the_parent_is_notified_after_the_reward_and_before_the_result(stage: Stage) -> None:
    await stage.phase("evaluate")
    await given(stage, "42", split=PART)
    await stage.seen("result")
    published = [one.parsed.tokens.get("phase", one.parsed.family) for one in stage.recorded]
    assert published == ["evaluate", "reward", "scale", "result"]


async def test_an_end_announced_again_is_sent_to_scale_again_under_the_same_id(stage: Stage) -> None:
    await stage.phase("evaluate")
    await with_plan(stage, envelope(ad(task_id="t1"), now=stage.bus.clock.now()), Subtask(id="x", description="do x"))
    env = await given(stage, "42", split=PART, inputs={"x": "out x"})
    await stage.seen("result")
    await stage.put("evaluate", replace(env, result=None, error=TaskError(code="deadline_exceeded")))
    await stage.seen("result", count=2)
    assert scale_ids(stage) == ["t1:done", "t1:unpark"] * 2
    assert await stage.pending("TASKS", stage.bus.subjects.task("scale", "*", "*")) == 2
    assert stage.all("result")[0] == stage.all("result")[1]


async def test_delegated_work_is_not_a_subtask_of_a_plan(stage: Stage) -> None:
    await stage.phase("evaluate")
    await given(stage, "42", split=replace(PART, subtask=None))
    await stage.seen("result")
    assert not scale_ids(stage)


@pytest.mark.parametrize("code", ["cancelled", "deadline_exceeded", "subtask_failed"])
async def test_the_plan_of_a_task_that_has_failed_is_over(stage: Stage, code: str) -> None:
    await stage.phase("evaluate")
    env = envelope(ad(task_id="t1"), now=stage.bus.clock.now())
    await with_plan(stage, env, Subtask(id="x", description="do x"))
    await given(stage, code=code)
    message = await stage.seen("task", phase="scale")
    assert message == ParentEnded(task_id="t1")
    assert scale_ids(stage) == ["t1:unpark"]


async def test_a_task_that_stayed_whole_has_no_plan_that_could_be_over(stage: Stage) -> None:
    await stage.phase("evaluate")
    await with_plan(stage, envelope(ad(task_id="t1"), now=stage.bus.clock.now()))
    await given(stage, code="cancelled")
    await stage.seen("result")
    assert not scale_ids(stage)


async def test_plans_are_read_only_for_tasks_that_may_have_one(stage: Stage) -> None:
    looks: list[str] = []

    async def record(_msg: Any) -> None:
        looks.append("plans")

    await stage.bus.connection.subscribe(f"$JS.API.STREAM.MSG.GET.KV_{stage.bus.subjects.bucket('plans')}", record)
    evaluate = await stage.phase("evaluate")
    await given(stage, "42", ad=ad(task_id="plain"))
    await stage.seen("result")
    await quiet(stage.bus, evaluate.bus)
    assert not looks
    await given(stage, "42", ad=ad(task_id="joined"), inputs={"x": "out x"})
    await stage.seen("result", count=2)
    await quiet(stage.bus, evaluate.bus)
    assert len(looks) == 1
