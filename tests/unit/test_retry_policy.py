from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.builders import ad, awarded, envelope

from loom.phases.evaluate.late_results import is_late
from loom.phases.evaluate.retry_policy import (
    COUNTED,
    MAX_RETRY_DELAY_S,
    RETRIED,
    Finish,
    Retry,
    decide,
    judge,
    unchecked,
)
from loom.phases.evaluate.rewards import implied_rewards, reward_for
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import IN_HAND_S, MAX_CAUSE_CHARS, Claim, Envelope, FailedAttempt, Opinion, RejectedResult
from loom.schemas.errors import BY_CODE
from loom.schemas.learning.judgement import judgement
from loom.schemas.record import TaskRecord
from loom.schemas.task import Accept, RunResult, TaskError, TaskResult

CONFIG = ClusterConfig(max_attempts=3)
FINAL = sorted(set(BY_CODE) - RETRIED - {"unknown", "invalid_task"})


def env(content: str | None = None, code: str | None = None, **facts: Any) -> Envelope:
    result = None if content is None else RunResult(content=content, prompt_tokens=10, completion_tokens=5)
    error = TaskError(code=code, node_id="n1") if code else None
    return awarded(envelope(ad(task_id="t1"), now=0, left_s=100, result=result, error=error, **facts))


def decided(message: Envelope, now: float = 0) -> Any:
    return decide(message, CONFIG, now)


def accepting(*texts: str, best_effort: bool = False) -> Envelope:
    return replace(env("forty-two is 42"), ad=ad(accept=Accept(contains=texts, best_effort=best_effort)))


def shown(end: Any) -> TaskResult:
    """Return the result that a submitter gets."""
    record = succeeded(
        end.envelope, state=end.state, score=end.score, below_threshold=end.below_threshold, rejected=end.rejected
    )
    return record.to_result()


def test_a_result_is_a_success_of_score_one() -> None:
    decision = decided(env("42"))
    assert isinstance(decision, Finish)
    assert (decision.state, decision.score, decision.below_threshold) == ("succeeded", 1.0, False)


@pytest.mark.parametrize("content", [None, "", "  \n"])
def test_an_empty_result_is_refused(content: str | None) -> None:
    refusal = judge(env(content))
    assert refusal is not None
    assert (refusal.code, refusal.node_id) == ("rejected_result", "n1")


@pytest.mark.parametrize(("texts", "good"), [(("42",), True), (("42", "forty"), True), (("42", "Forty"), False)])
def test_a_result_must_contain_every_requested_text_exactly(texts: tuple[str, ...], good: bool) -> None:
    assert (judge(accepting(*texts)) is None) is good


@pytest.mark.parametrize("code", sorted(COUNTED))
def test_a_nodes_fault_is_counted_excludes_it_and_sends_the_task_back(code: str) -> None:
    decision = decided(env(code=code))
    assert isinstance(decision, Retry)
    back = decision.envelope
    assert (back.attempt, back.failures, back.excluded) == (2, 1, ("n1",))
    assert back.error is None
    assert back.result is None
    assert back.last_error is not None
    assert back.last_error.code == code


def test_a_busy_node_is_neither_counted_nor_excluded() -> None:
    decision = decided(env(code="node_busy", failures=2))
    assert isinstance(decision, Retry)
    assert (decision.envelope.attempt, decision.envelope.failures, decision.envelope.excluded) == (2, 2, ())


@pytest.mark.parametrize("code", FINAL)
def test_every_other_code_ends_the_task(code: str) -> None:
    decision = decided(env(code=code))
    assert isinstance(decision, Finish)
    assert decision.state == ("cancelled" if code == "cancelled" else "failed")
    assert decision.envelope.error is not None
    assert decision.envelope.error.code == code


def test_a_code_of_a_newer_peer_ends_the_task_too() -> None:
    assert isinstance(decided(env(code="from_the_future")), Finish)


def test_a_node_is_excluded_once_however_often_it_fails() -> None:
    decision = decided(env(code="node_lost", excluded=("n1",)))
    assert isinstance(decision, Retry)
    assert decision.envelope.excluded == ("n1",)


@pytest.mark.parametrize(
    ("code", "failures", "pause_s"),
    [("agent_failed", 0, 0.1), ("node_lost", 1, 0.2), ("rejected_result", 1, 0), ("node_busy", 2, 0)],
)
def test_a_failing_node_costs_a_pause_that_doubles(code: str, failures: int, pause_s: float) -> None:
    decision = decided(env(code=code, failures=failures))
    assert isinstance(decision, Retry)
    assert decision.delay_s == pytest.approx(pause_s)


def test_pauses_are_bounded() -> None:
    decision = decide(env(code="node_lost", failures=98), ClusterConfig(max_attempts=100), 0)
    assert isinstance(decision, Retry)
    assert decision.delay_s == MAX_RETRY_DELAY_S


def test_a_failed_attempt_is_recorded_with_its_reason() -> None:
    raised = TaskError(code="agent_failed", message="x" * 2000)
    decision = decided(replace(env("half an answer", attempt=4), error=raised))
    assert isinstance(decision, Retry)
    [failed] = decision.envelope.failed_attempts
    assert (failed.attempt, failed.node_id, failed.code, failed.tokens) == (4, "n1", "agent_failed", 15)
    assert len(failed.message) == MAX_CAUSE_CHARS


def rate_limited(retry_after_s: float) -> Envelope:
    """An attempt whose node asked for a later retry, at the time when no other node bids."""
    limited = TaskError(code="agent_failed", message="too busy", retry_after_s=retry_after_s)
    decision = decided(replace(env(), error=limited), now=10)
    assert isinstance(decision, Retry)
    assert decision.envelope.excluded == ("n1",)
    return decision.envelope.failed(TaskError(code="no_bids"))


def test_a_rate_limited_node_is_excluded_until_only_such_nodes_are_left() -> None:
    decision = decided(rate_limited(30), now=15)
    assert isinstance(decision, Retry)
    assert decision.delay_s == pytest.approx(25)
    again = decision.envelope
    assert (again.attempt, again.failures, again.excluded, again.retry_at) == (3, 1, (), {})
    assert again.last_error is not None
    assert again.last_error.code == "agent_failed"


def test_a_rest_past_the_deadline_is_not_waited_for() -> None:
    decision = decided(rate_limited(90), now=15)
    assert isinstance(decision, Finish)
    assert decision.envelope.error is not None
    assert decision.envelope.error.message == "too busy"


def test_the_node_that_is_rested_first_is_tried_first() -> None:
    left = env(code="no_bids", failures=2, excluded=("n1", "n2", "n3"), retry_at={"n1": 40.0, "n2": 20.0})
    decision = decided(left, now=15)
    assert isinstance(decision, Retry)
    assert (decision.envelope.excluded, decision.envelope.retry_at) == (("n1", "n3"), {"n1": 40.0})


def test_failures_are_bounded_by_max_attempts() -> None:
    decision = decided(env(code="agent_failed", failures=2, attempt=9))
    assert isinstance(decision, Finish)
    assert (decision.state, decision.envelope.failures) == ("failed", 3)
    assert decision.envelope.error is not None
    assert decision.envelope.error.code == "agent_failed"


@pytest.mark.parametrize("best_effort", [False, True])
def test_a_refused_result_is_kept_until_attempts_run_out(best_effort: bool) -> None:
    first = decide(replace(accepting("nowhere", best_effort=best_effort), attempt=1), CONFIG, 0)
    assert isinstance(first, Retry)
    assert first.envelope.best_rejected is not None
    assert first.envelope.best_rejected.node_id == "n1"
    own = TaskError(code="agent_failed", message="it raised", node_id="n2")
    last = decided(replace(awarded(first.envelope, "n2", "h2"), error=own, failures=2))
    assert isinstance(last, Finish)
    assert last.envelope.error == own, "by which its node is rewarded"
    result = shown(last)
    if best_effort:
        assert (result.state, result.below_threshold, result.score, result.error) == ("succeeded", True, 0.0, None)
        assert (result.content, result.node_id) == ("forty-two is 42", "n1")
    else:
        assert (result.state, result.below_threshold, result.content) == ("failed", False, "")
        assert result.error is not None
        assert result.error.code == "rejected_result"
        assert result.error.message == (
            "the result does not contain 'nowhere' (the best refused answer, of n1); "
            "the last attempt ended with agent_failed: it raised"
        )
        best = result.error.best_rejected
        assert best is not None
        assert (best.content, best.node_id, best.score) == ("forty-two is 42", "n1", 0.0)
        assert best.reason == "the result does not contain 'nowhere'"


def test_a_task_whose_tokens_ran_out_after_a_refused_answer_ends_as_rejected() -> None:
    ended = decided(replace(accepting("nowhere"), budget=0))
    assert isinstance(ended, Finish)
    assert ended.envelope.error is not None
    assert ended.envelope.error.code == "rejected_result", "so that its node is rewarded"
    assert shown(ended).error == replace(shown(ended).error, code="rejected_result")


@pytest.mark.parametrize("best_effort", [False, True])
@pytest.mark.parametrize("code", ["deadline_exceeded", "node_busy"])
def test_a_deadline_that_comes_after_a_refused_answer_keeps_its_code_and_shows_the_answer(
    code: str, best_effort: bool
) -> None:
    best = RejectedResult(result=RunResult(content="nearly"), score=0.4, reason="too short", node_id="n0", host_id="h0")
    task = ad(accept=Accept(best_effort=best_effort))
    ended = decided(replace(env(code=code, failures=1, best_rejected=best), ad=task), now=1000)
    result = shown(ended)
    if best_effort:
        assert (result.state, result.content, result.below_threshold) == ("succeeded", "nearly", True)
    else:
        assert result.error is not None
        assert result.error.best_rejected == best.to_rejected()
        assert (result.state, result.error.code) == ("failed", "deadline_exceeded")


def test_an_unchecked_result_is_not_replaced_by_an_earlier_one() -> None:
    best = RejectedResult(result=RunResult(content="nearly"), node_id="n0", host_id="h0")
    message = replace(env("42", best_rejected=best), ad=ad(accept=Accept(pattern="x", best_effort=True)))
    ended = decide(message, CONFIG, 1000, unchecked("no process can be started"))
    assert isinstance(ended, Finish)
    assert (ended.state, ended.rejected) == ("failed", False)


def test_an_end_without_an_own_attempt_gives_no_reward() -> None:
    best = RejectedResult(result=RunResult(content="nearly"), node_id="n0", host_id="h0")
    tried = (FailedAttempt(attempt=1, node_id="n0", host_id="h0", code="rejected_result", message="too short"),)
    left = env(
        code="no_bids", failures=1, best_rejected=best, failed_attempts=tried, last_error=TaskError(code="node_busy")
    )
    ended = decided(replace(left, award=None, error=TaskError(code="no_bids")))
    assert isinstance(ended, Finish)
    assert implied_rewards(succeeded(ended.envelope, state=ended.state, rejected=ended.rejected)) == ()
    error = shown(ended).error
    assert error is not None
    assert error.code == "rejected_result"


def test_the_first_refused_result_is_not_replaced_by_an_equal_one() -> None:
    best = RejectedResult(result=RunResult(content="first"), node_id="n0", host_id="h0")
    decision = decide(replace(accepting("nowhere"), best_rejected=best), CONFIG, 0)
    assert isinstance(decision, Retry)
    assert decision.envelope.best_rejected == best


def test_an_empty_result_is_nothing_to_keep() -> None:
    decision = decided(env(""))
    assert isinstance(decision, Retry)
    assert decision.envelope.best_rejected is None


def test_without_further_bidders_the_last_attempts_own_error_is_the_result() -> None:
    own = TaskError(code="agent_failed", message="it raised")
    decision = decided(env(code="no_bids", failures=1, last_error=own))
    assert isinstance(decision, Finish)
    assert decision.envelope.error == own


@pytest.mark.parametrize("best_effort", [False, True])
def test_without_further_bidders_only_best_effort_returns_the_best_refused_result(best_effort: bool) -> None:
    best = RejectedResult(result=RunResult(content="nearly"), node_id="n0", host_id="h0")
    left = env(code="no_bids", failures=1, best_rejected=best, last_error=TaskError(code="rejected_result"))
    decision = decided(replace(left, ad=ad(accept=Accept(best_effort=best_effort))))
    assert isinstance(decision, Finish)
    ends = {True: ("succeeded", True, False), False: ("failed", False, True)}
    assert (decision.state, decision.below_threshold, decision.rejected) == ends[best_effort]


@pytest.mark.parametrize("last", [None, "node_busy"])
def test_no_bids_is_the_end_when_no_attempt_failed_or_the_last_was_only_busy(last: str | None) -> None:
    last_error = TaskError(code=last) if last else None
    decision = decided(env(code="no_bids", failures=1 if last else 0, last_error=last_error))
    assert isinstance(decision, Finish)
    assert decision.envelope.error is not None
    assert decision.envelope.error.code == "no_bids"


@pytest.mark.parametrize(("code", "ends_with"), [("node_lost", "node_lost"), ("node_busy", "deadline_exceeded")])
def test_past_the_deadline_nothing_is_sent_back(code: str, ends_with: str) -> None:
    decision = decided(env(code=code), now=100)
    assert isinstance(decision, Finish)
    assert decision.state == "failed"
    assert decision.envelope.error is not None
    assert decision.envelope.error.code == ends_with


def test_a_result_that_came_late_still_counts() -> None:
    decision = decided(env("42"), now=1000)
    assert isinstance(decision, Finish)
    assert decision.state == "succeeded"


codes = st.sampled_from([*sorted(BY_CODE), "strange"])


@given(st.none() | codes, st.none() | st.text(max_size=3), st.integers(0, 5), st.integers(1, 9), st.floats(0, 200))
def test_every_envelope_ends_or_goes_back_with_a_higher_attempt_and_bounded_failures(
    code: str | None, content: str | None, failures: int, attempt: int, now: float
) -> None:
    decision = decided(env(content, code, failures=failures, attempt=attempt), now)
    if isinstance(decision, Retry):
        assert decision.envelope.attempt == attempt + 1
        assert decision.envelope.failures < CONFIG.max_attempts
        assert now < decision.envelope.deadline
    elif decision.state == "succeeded":
        assert decision.envelope.result is not None
        assert decision.envelope.result.content.strip()
    else:
        spent = decision.envelope.error is not None and decision.envelope.error.code == "budget_exceeded"
        assert spent or decision.envelope.result is None
        assert decision.envelope.error is not None


def test_a_success_earns_one_with_its_parts_for_people() -> None:
    reward = reward_for(env("42"), None, 50.0)
    assert reward is not None
    assert (reward.reward_id, reward.score, reward.node_id, reward.domain_token) == ("t1:1:rules", 1.0, "n1", "code")
    assert (reward.tokens, reward.ended_at, reward.signal.quality) == (15, 50.0, 0.7)
    assert reward.signal.total == pytest.approx(0.5 * 0.7 + 0.3 * (1 - 15 / 4096) + 0.2)


def test_failed_tool_calls_cost_reliability_only() -> None:
    message = replace(env(), result=RunResult(content="42", tool_errors=1))
    reward = reward_for(message, None, 50.0)
    assert reward is not None
    assert (reward.score, reward.signal.reliability) == (1.0, 0.0)


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_a_failure_scores_zero_if_the_node_is_at_fault_and_otherwise_gives_no_reward(code: str) -> None:
    message = env("refused" if code == "rejected_result" else None, code)
    reward = reward_for(message, message.error, 50.0)
    assert (reward is not None) is (code in COUNTED | {"deadline_exceeded"})
    if reward is not None:
        assert (reward.score, reward.signal.total, reward.reason) == (0.0, 0.0, code)


def test_a_deadline_that_passed_before_the_run_is_not_its_nodes_fault() -> None:
    late = TaskError(code="deadline_exceeded", message="the deadline passed before the run began")
    assert reward_for(env(), late, 50.0) is None


def test_a_task_without_an_award_gives_no_reward() -> None:
    assert reward_for(replace(env("42"), award=None), None, 0.0) is None


def record(message: Envelope, **facts: Any) -> TaskRecord:
    return TaskRecord(task_id="t1", state="running", envelope=message, admitted_at=0, **facts)


def test_an_ended_record_implies_one_and_the_same_reward_and_a_running_one_none() -> None:
    ended = record(env("42"), ended_at=9.0)
    assert implied_rewards(ended) == implied_rewards(ended)
    assert len(implied_rewards(ended)) == 1
    assert implied_rewards(record(env("42"))) == ()


def test_a_reward_has_the_labels_of_its_task() -> None:
    message = env("42")
    message = replace(message, ad=replace(message.ad, labels={"tenant": "acme"}))
    ended = replace(record(message, ended_at=9.0), state="succeeded")
    (reward,) = implied_rewards(ended)
    assert reward.labels == judgement(ended, 0.5, "").labels == ended.to_result().labels == {"tenant": "acme"}
    assert len({ended.to_result(), reward}) == 2


def test_an_end_with_a_kept_result_still_rewards_the_last_attempt_with_nought() -> None:
    best = RejectedResult(result=RunResult(content="nearly"), node_id="n0", host_id="h0")
    ending = decided(env(code="agent_failed", failures=2, best_rejected=best, attempt=3))
    assert isinstance(ending, Finish)
    (reward,) = implied_rewards(record(ending.envelope, ended_at=9.0))
    assert (reward.node_id, reward.score, reward.reward_id) == ("n1", 0.0, "t1:3:rules")


@pytest.mark.parametrize(
    ("attempt", "code", "late"),
    [(1, None, True), (1, "node_lost", True), (2, None, False), (3, "no_bids", False), (1, "cancelled", False)],
)
def test_a_replaced_attempt_is_late_unless_it_carries_a_cancel(attempt: int, code: str | None, late: bool) -> None:
    assert is_late(env("42", code, attempt=attempt), record(env(), claim=Claim(attempt=2))) is late


def test_a_spent_budget_returns_the_answer_so_far() -> None:
    decision = decided(env("half an ans", "budget_exceeded"))
    assert isinstance(decision, Finish)
    assert decision.state == "failed"
    assert decision.envelope.result is not None
    assert decision.envelope.result.content == "half an ans"


def test_the_text_of_a_failing_agent_is_not_an_answer() -> None:
    decision = decided(env("half an ans", "agent_failed"))
    assert isinstance(decision, Retry)
    assert decision.envelope.best_rejected is None
    assert decision.envelope.failed_attempts[-1].tokens == 15


def test_without_tokens_left_the_task_is_not_retried() -> None:
    decision = decided(env("half", "agent_failed", budget=0))
    assert isinstance(decision, Finish)
    assert decision.envelope.error is not None
    assert decision.envelope.error.code == "budget_exceeded"


# -- a model's opinion


def judged_as(score: float, threshold: float = 0.5, **facts: Any) -> Envelope:
    opinion = Opinion(score=score, reason="so and so")
    return replace(env("an answer", **facts), opinion=opinion, ad=ad(task_id="t1", accept=Accept(threshold=threshold)))


def test_an_opinion_is_the_score_of_a_success_and_of_its_reward() -> None:
    decision = decided(judged_as(0.8))
    assert isinstance(decision, Finish)
    assert (decision.state, decision.score) == ("succeeded", 0.8)
    earned = reward_for(decision.envelope, None, 5.0)
    assert earned is not None
    assert earned.score == 0.8


def test_an_answer_below_the_threshold_is_kept_and_another_node_retries() -> None:
    decision = decided(judged_as(0.6, threshold=0.7))
    assert isinstance(decision, Retry)
    back = decision.envelope
    assert (back.excluded, back.opinion) == (("n1",), None)
    assert back.last_error is not None
    assert "judged 0.60, at least 0.70" in back.last_error.message
    assert back.best_rejected is not None
    assert back.best_rejected.score == 0.6
    earned = reward_for(judged_as(0.6, threshold=0.7), back.last_error, 5.0)
    assert earned is not None
    assert earned.score == 0.6


@pytest.mark.parametrize(("score", "kept"), [(0.3, "first"), (0.4, "first"), (0.45, "an answer")])
def test_of_refused_answers_the_best_is_shown_in_the_end(score: float, kept: str) -> None:
    best = RejectedResult(result=RunResult(content="first"), score=0.4, node_id="n0", host_id="h0")
    error = shown(decided(judged_as(score, failures=2, best_rejected=best))).error
    assert error is not None
    assert error.best_rejected is not None
    assert (error.best_rejected.content, error.best_rejected.score) == (kept, max(score, 0.4))


def test_a_failed_node_scores_zero_despite_any_opinion() -> None:
    failed = TaskError(code="agent_failed")
    earned = reward_for(replace(judged_as(0.9), error=failed), failed, 5.0)
    assert earned is not None
    assert earned.score == 0.0


def test_rules_come_before_opinions() -> None:
    refused = replace(judged_as(1.0), ad=ad(accept=Accept(contains=("42",))))
    decision = decided(refused)
    assert isinstance(decision, Retry)


def test_a_full_node_is_retried_after_a_pause_that_grows_to_five_seconds() -> None:
    message = env()
    pauses, delays = [], []
    for _ in range(12):
        again = decided(message.failed(TaskError(code="node_busy", message="full")))
        assert isinstance(again, Retry)
        assert (again.envelope.failures, again.envelope.excluded) == (0, ())
        message = again.envelope
        pauses.append(message.busy_pause_s)
        delays.append(again.delay_s)
    assert pauses[:4] == [0.02, 0.04, 0.08, 0.16]
    assert pauses[-1] == 5.0
    assert delays == [0.0 if pause <= IN_HAND_S else pause for pause in pauses]


# -- an opinion that is missing


def unjudged(rubric: str | None = None) -> Envelope:
    accept = Accept(rubric=rubric)
    return replace(env("an answer"), unjudged="TimeoutError", ad=ad(task_id="t1", accept=accept))


def test_without_an_opinion_the_score_is_none_and_the_reward_is_of_the_rules() -> None:
    decision = decided(unjudged())
    assert isinstance(decision, Finish)
    assert (decision.state, decision.score) == ("succeeded", None)
    (reward,) = implied_rewards(record(decision.envelope, ended_at=9.0))
    assert reward.score == 1.0


def test_a_rubric_that_was_not_checked_earns_nothing() -> None:
    decision = decided(unjudged("be complete"))
    assert isinstance(decision, Finish)
    assert (decision.state, decision.score) == ("succeeded", None)
    assert implied_rewards(record(decision.envelope, ended_at=9.0)) == ()


def test_a_failure_scores_zero_with_an_unchecked_rubric() -> None:
    failed = TaskError(code="agent_failed")
    reward = reward_for(replace(unjudged("be complete"), error=failed), failed, 5.0)
    assert reward is not None
    assert reward.score == 0.0


def test_the_next_attempt_is_judged_again_and_keeps_the_warnings() -> None:
    message = replace(unjudged(), error=TaskError(code="agent_failed"), warnings=("the judge was away",))
    decision = decided(message)
    assert isinstance(decision, Retry)
    assert (decision.envelope.unjudged, decision.envelope.warnings) == ("", ("the judge was away",))


# -- a node's word that the ad is invalid


def invalid(node_id: str = "n1", *earlier: str, **facts: Any) -> Envelope:
    tried = tuple(
        FailedAttempt(attempt=n, node_id=name, host_id="h", code="invalid_task") for n, name in enumerate(earlier, 1)
    )
    word = TaskError(code="invalid_task", message="no such file", field="context", node_id=node_id)
    message = env(attempt=len(tried) + 1, failures=len(tried), failed_attempts=tried, **facts)
    return replace(awarded(message, node_id), error=word)


def test_one_invalid_task_error_retries_elsewhere_counted_and_without_a_reward() -> None:
    decision = decided(invalid())
    assert isinstance(decision, Retry)
    back = decision.envelope
    assert (back.attempt, back.failures, back.excluded, decision.delay_s) == (2, 1, ("n1",), 0.0)
    assert [tried.code for tried in back.failed_attempts] == ["invalid_task"]
    assert reward_for(invalid(), back.last_error, 5.0) is None


def test_a_second_nodes_invalid_task_error_ends_the_task() -> None:
    decision = decided(invalid("n2", "n1"))
    assert isinstance(decision, Finish)
    assert decision.state == "failed"
    assert decision.envelope.error == invalid("n2").error
    assert implied_rewards(succeeded(decision.envelope, state="failed")) == ()


def test_the_same_node_does_not_count_as_a_second_opinion() -> None:
    assert isinstance(decided(invalid("n1", "n1")), Retry)


def test_a_pinned_task_ends_at_once() -> None:
    decision = decided(replace(invalid(), ad=ad(task_id="t1", node_id="n1")))
    assert isinstance(decision, Finish)
    assert decision.envelope.error is not None
    assert decision.envelope.error.code == "invalid_task"


@pytest.mark.parametrize("award", [None, "n1"])
def test_a_rule_broken_by_the_ad_ends_the_task_with_and_without_an_award(award: str | None) -> None:
    fault = TaskError(code="invalid_task", message="description is empty", field="description")
    message = env() if award else replace(env(), award=None)
    decision = decided(replace(message, error=fault))
    assert isinstance(decision, Finish)
    assert decision.envelope.failures == 0


def test_without_another_bidder_the_error_of_the_node_is_the_result() -> None:
    back = decided(invalid())
    assert isinstance(back, Retry)
    decision = decided(replace(back.envelope, award=None).failed(TaskError(code="no_bids")))
    assert isinstance(decision, Finish)
    assert decision.envelope.error == invalid().error


def test_exhausted_attempts_end_the_task_with_the_error_of_the_node() -> None:
    decision = decided(replace(invalid(), failures=2))
    assert isinstance(decision, Finish)
    assert decision.envelope.error == invalid().error


def succeeded(message: Envelope, **facts: Any) -> TaskRecord:
    return TaskRecord(task_id="t1", envelope=message, admitted_at=0, ended_at=9.0, **{"state": "succeeded", **facts})


def test_a_success_elsewhere_refutes_the_invalid_task_error_once() -> None:
    tried = (
        FailedAttempt(attempt=1, node_id="n1", host_id="h", code="invalid_task", tokens=7, duration_s=2.0),
        FailedAttempt(attempt=2, node_id="n2", host_id="h", code="agent_failed"),
    )
    ended = succeeded(awarded(env("42", attempt=3, failed_attempts=tried), "n3"))
    own, refuted = implied_rewards(ended)
    assert (own.reward_id, own.node_id, own.score) == ("t1:3:rules", "n3", 1.0)
    assert (refuted.reward_id, refuted.node_id, refuted.score, refuted.domain_token) == (
        "t1:1:rules",
        "n1",
        0.0,
        "code",
    )
    assert (refuted.attempt, refuted.tokens, refuted.seconds, refuted.ended_at) == (1, 7, 2.0, 9.0)
    assert implied_rewards(ended) == (own, refuted)


# -- nodes are of their owners


def test_a_failed_node_is_excluded_counted_and_rewarded_with_its_owner() -> None:
    message = replace(awarded(env(), owner="acme"), error=TaskError(code="agent_failed", retry_after_s=5.0))
    back = decided(message).envelope
    assert (back.excluded, list(back.retry_at)) == (("acme.n1",), ["acme.n1"])
    assert [tried.node for tried in back.failed_attempts] == ["acme.n1"]
    reward = reward_for(message, message.error, 5.0)
    assert reward is not None
    assert (reward.node, reward.node_key) == ("acme.n1", "acme.n1")
    again = decided(replace(awarded(back), error=TaskError(code="agent_failed"))).envelope
    assert again.excluded == ("acme.n1", "n1"), "a node of that name and another owner is another node"


def test_the_second_invalid_task_error_may_come_from_another_owners_node_of_this_name() -> None:
    earlier = invalid("n1", "n1")
    assert isinstance(decided(earlier), Retry)
    other = replace(awarded(earlier, owner="acme"), error=earlier.error)
    assert isinstance(decided(other), Finish)


def test_a_refuted_invalid_task_error_costs_the_node_of_that_owner() -> None:
    tried = FailedAttempt(attempt=1, node_id="n1", owner="acme", host_id="h", code="invalid_task")
    _, refuted = implied_rewards(succeeded(awarded(env("42", attempt=2, failed_attempts=(tried,)), "n1")))
    assert (refuted.node, refuted.source, refuted.score) == ("acme.n1", "rules", 0.0)


def test_an_answer_that_a_model_has_judged_is_rewarded_by_the_judge() -> None:
    judged = reward_for(replace(env("42"), opinion=Opinion(score=0.8)), None, 5.0)
    assert judged is not None
    assert (judged.source, judged.reward_id, judged.score) == ("judge", "t1:1:judge", 0.8)
    failed = replace(env(code="agent_failed"), opinion=Opinion(score=0.8))
    ruled = reward_for(failed, failed.error, 5.0)
    assert ruled is not None
    assert (ruled.source, ruled.score) == ("rules", 0.0)


@pytest.mark.parametrize("source", ["person", "alice"])
def test_a_person_judges_the_node_of_the_shown_answer(source: str) -> None:
    refused = RejectedResult(result=RunResult(content="41"), node_id="n1", owner="acme", host_id="h")
    tried = FailedAttempt(attempt=1, node_id="n1", owner="acme", host_id="h", code="rejected_result")
    same_name = replace(tried, attempt=2, owner="local")
    message = awarded(env("x", attempt=2, failed_attempts=(tried, same_name), best_rejected=refused), "n1")
    given = judgement(succeeded(message, state="failed", rejected=True), 0.5, "", source)
    assert (given.node, given.reward_id, given.source) == ("acme.n1", f"t1:1:{source}", source)


@pytest.mark.parametrize("facts", [{"state": "failed"}, {"state": "cancelled"}, {"below_threshold": True}])
def test_anything_less_than_a_success_refutes_nothing(facts: dict[str, Any]) -> None:
    tried = (FailedAttempt(attempt=1, node_id="n1", host_id="h", code="invalid_task"),)
    error = None if "below_threshold" in facts else TaskError(code="cancelled")
    message = replace(awarded(env("42", attempt=2, failed_attempts=tried), "n2"), error=error)
    assert "n1" not in {reward.node_id for reward in implied_rewards(succeeded(message, **facts))}


def test_a_success_with_an_unchecked_rubric_refutes_nothing() -> None:
    tried = (FailedAttempt(attempt=1, node_id="n0", host_id="h", code="invalid_task"),)
    assert implied_rewards(succeeded(replace(unjudged("be complete"), failed_attempts=tried))) == ()


# -- what it took

attempts = st.lists(
    st.tuples(st.sampled_from([*sorted(BY_CODE), ""]), st.none() | st.integers(0, 1000), st.booleans()), min_size=1
)


@given(attempts, st.integers(1, 20))
def test_however_a_task_ends_its_result_has_the_tokens_of_all_attempts_and_its_budget_agrees(
    tries: list[tuple[str, int | None, bool]], max_attempts: int
) -> None:
    message = replace(env(), budget=10**6)
    took = 0
    for code, tokens, refused in tries:
        result = None if tokens is None else RunResult(content="" if refused else "x", prompt_tokens=tokens)
        took += tokens or 0
        error = TaskError(code=code, node_id="n1") if code else None
        message = replace(awarded(message), result=result, error=error, budget=10**6 - took)
        decision = decide(message, ClusterConfig(max_attempts=max_attempts), 0)
        message = decision.envelope
        if isinstance(decision, Finish):
            ended = succeeded(message, state=decision.state, below_threshold=decision.below_threshold)
            assert ended.used.tokens == ended.to_result().prompt_tokens == took
            return
        assert (message.spent.tokens, message.result) == (took, None)
        assert message.budget == 10**6 - message.spent.tokens


@pytest.mark.parametrize("facts", [{"state": "failed", "rejected": True}, {"below_threshold": True}])
def test_the_judgement_of_a_refused_answer_applies_to_its_attempt(facts: dict[str, Any]) -> None:
    best = RejectedResult(result=RunResult(content="nearly"), node_id="n0", host_id="h0")
    tried = (FailedAttempt(attempt=1, node_id="n0", host_id="h0", code="rejected_result"),)
    message = env(code="agent_failed", attempt=2, best_rejected=best, failed_attempts=tried)
    reward = judgement(succeeded(message, **facts), 0.4, "close")
    assert (reward.reward_id, reward.node_id, reward.attempt, reward.score) == ("t1:1:person", "n0", 1, 0.4)
