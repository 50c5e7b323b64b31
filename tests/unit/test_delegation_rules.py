"""Delegation without a bus: ids, grants, slots, the child's envelope and its spent tokens."""

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.builders import ad, awarded, envelope
from support.strategies import tokens

from loom import delegate
from loom.agents.host.delegation import Delegator, delegation_error
from loom.agents.host.runs import Run
from loom.agents.host.slots import RunQueue
from loom.bus.bus import Bus
from loom.phases.execute.delegation import delegated_envelope, result_for_run
from loom.phases.shared.token_usage import total_tokens
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope, Split
from loom.schemas.errors import BudgetExceeded, InvalidTask, LoomError
from loom.schemas.record import TaskRecord
from loom.schemas.run import RunRequest, delegated_id
from loom.schemas.task import Limits, PhaseUsage, RunResult, TaskError, TaskResult
from loom.schemas.tokens import is_token

CONFIG = ClusterConfig(max_depth=2)


def run(task_id: str = "t", **facts: Any) -> Run:
    return Run(cast("Bus", None), RunRequest(task_id=task_id, description="x", **facts), "inbox")


# -- ids


@given(tokens, st.integers(1, 99), st.integers(1, 99), st.integers(1, 99), st.integers(1, 99))
def test_an_id_follows_from_task_attempt_and_call_and_from_nothing_else(
    task_id: str, attempt: int, call: int, other_attempt: int, other_call: int
) -> None:
    one = delegated_id(task_id, attempt, call)
    assert is_token(one)
    assert len(one) == 26
    same = delegated_id(task_id, other_attempt, other_call) == one
    assert same == ((attempt, call) == (other_attempt, other_call))


def test_an_id_is_the_same_in_every_process() -> None:
    assert delegated_id("t1", 1, 1) == "p75q56isdsysljnohmtqord5qm"


# -- the tool


async def test_only_a_run_on_a_host_can_delegate() -> None:
    with pytest.raises(LoomError, match="only a run on a node host"):
        await delegate("add two numbers", domain="code")


def test_the_delegate_tool_shows_a_task_and_a_domain() -> None:
    assert delegate.name == "delegate"
    schema = delegate.definition.parameters
    assert schema["required"] == ["task"]
    assert schema["properties"]["domain"]["type"] == "string"
    assert "best at it" in delegate.definition.description


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (TaskError(code="no_bids", message="no node bid"), "delegated work failed: no_bids: no node bid"),
        (TaskError(code="subtask_failed", message="further down"), "further down"),
        (None, "ended as cancelled"),
    ],
)
def test_a_failure_names_its_cause_once(error: TaskError | None, sentence: str) -> None:
    state: Any = "failed" if error else "cancelled"
    raised = delegation_error(TaskResult(task_id="c", state=state, error=error))
    assert raised.message.endswith(sentence)
    assert raised.code == "subtask_failed"


# -- grants


def delegator(**facts: Any) -> Delegator:
    return Delegator(run(**facts), RunQueue(1, 1), lambda: None)


def test_without_a_limit_an_agent_grants_any_budget() -> None:
    assert (delegator()._grant(None), delegator()._grant(500)) == (None, 500)


def test_a_grant_is_half_of_the_rest_or_the_requested_amount_within_the_rest() -> None:
    one = delegator(token_budget=100)
    assert (one._grant(None), one._grant(30), one._grant(1000)) == (50, 30, 100)
    one.report_tokens(40)
    one.run.add_tokens(TaskResult(task_id="c", state="succeeded", prompt_tokens=10, completion_tokens=20))
    assert one._grant(1000) == 30
    one.report_tokens(70)
    with pytest.raises(BudgetExceeded, match="none of the task's 100 tokens"):
        one._grant(1)


def test_tokens_of_others_count_once_and_too_many_exceed_the_budget() -> None:
    one = delegator(token_budget=100)
    own = RunResult(content="x", prompt_tokens=30, completion_tokens=30)
    assert (one.overspent(own), one.run.with_delegated_usage(own), one.run.with_delegated_usage(None)) == (
        None,
        own,
        None,
    )
    one.run.add_tokens(TaskResult(task_id="c", state="succeeded", prompt_tokens=20, completion_tokens=20))
    assert one.overspent(own) is None
    assert one.run.with_delegated_usage(own) == RunResult(content="x", prompt_tokens=50, completion_tokens=50)
    one.run.add_tokens(TaskResult(task_id="d", state="failed", prompt_tokens=1))
    too_dear = one.overspent(own)
    assert too_dear is not None
    assert (too_dear.code, "101 were used, 41 of them by delegated tasks" in too_dear.message) == (
        "budget_exceeded",
        True,
    )


# -- slots


def test_a_waiting_run_frees_its_slot_and_resumes_before_newcomers() -> None:
    room = RunQueue(1, 5)
    first, second, third = run("1"), run("2"), run("3", priority="critical")
    for one in (first, second, third):
        room.enqueue(one)
    assert room.start_next() is third
    room.suspend(third)
    assert room.start_next() is first
    room.resume(third)
    assert (room.running, room.queued, room.busy) == ({first}, 2, True)
    assert room.start_next() is None
    assert not third.has_slot.is_set()
    room.remove(first)
    assert room.start_next() is None
    assert (room.running, room.suspended, third.has_slot.is_set()) == ({third}, set(), True)
    room.remove(third)
    assert room.start_next() is second


def test_a_queue_of_suspended_runs_is_busy_and_not_full() -> None:
    room = RunQueue(1, 0)
    one = run()
    room.enqueue(one)
    room.start_next()
    assert room.full
    room.suspend(one)
    assert (room.full, room.load, room.busy) == (False, 0, True)
    room.resume(one)
    room.remove(one)
    assert (room.busy, room.queued) == (False, 0)


# -- the child


def parent(**facts: Any) -> Envelope:
    return awarded(envelope(ad(priority="high", **facts.pop("ad", {})), now=1000.0, trace="00-x", **facts))


def test_delegated_work_inherits_urgency_deadline_limits_and_trace() -> None:
    env = parent(ad={"limits": Limits(max_depth=1)})
    child = delegated_envelope(env, ad("part", task_id="c", priority="low", timeout_s=9999), CONFIG)
    assert (child.ad.description, child.priority, child.deadline, child.trace) == ("part", "high", env.deadline, "00-x")
    assert child.split == Split(parent=env.task_id, depth=1, deadline=env.deadline)
    assert (child.ad.limits, child.budget) == (env.ad.limits, None)


@pytest.mark.parametrize(
    ("own", "outer", "left"),
    [
        (None, None, None),
        (None, ("a", "b"), ("a", "b")),
        (("b",), None, ("b",)),
        (("c", "b"), ("a", "b"), ("b",)),
        (("c",), ("a",), ()),
        (None, (), ()),
    ],
)
def test_delegated_work_may_use_no_tool_that_the_task_may_not(
    own: tuple[str, ...] | None, outer: tuple[str, ...] | None, left: tuple[str, ...] | None
) -> None:
    child = delegated_envelope(parent(ad={"tools_allowed": outer}), ad(task_id="c", tools_allowed=own), CONFIG)
    assert child.ad.tools_allowed == left


def test_delegated_work_has_the_labels_of_its_task_and_its_run_has_none() -> None:
    child = delegated_envelope(parent(ad={"labels": {"tenant": "a"}}), ad(task_id="c", labels={"tenant": "b"}), CONFIG)
    record = TaskRecord(task_id="c", state="succeeded", envelope=child, admitted_at=0, ended_at=1)
    assert (child.ad.labels, record.to_result().labels, result_for_run(record).labels) == ({"tenant": "a"},) * 2 + ({},)


def test_delegated_work_that_needs_a_tool_the_task_may_not_use_is_invalid() -> None:
    with pytest.raises(InvalidTask, match="tools_allowed lacks: shell"):
        delegated_envelope(parent(ad={"tools_allowed": ("add",)}), ad(task_id="c", required_tools=("shell",)), CONFIG)


@pytest.mark.parametrize(
    ("asked", "left", "granted"), [(None, None, None), (5, None, 5), (None, 7, 7), (5, 7, 5), (9, 7, 7)]
)
def test_delegated_work_gets_the_requested_budget_within_the_rest(
    asked: int | None, left: int | None, granted: int | None
) -> None:
    child = delegated_envelope(parent(budget=left), ad(task_id="c", token_budget=asked), CONFIG)
    assert child.split is not None
    assert (child.budget, child.split.grant, child.ad.token_budget) == (granted, granted, granted)


@pytest.mark.parametrize(
    ("depth", "limit", "refused"),
    [(0, None, False), (1, None, False), (2, None, True), (0, 0, True), (0, 1, False), (1, 1, True), (2, 9, True)],
)
def test_delegating_ends_at_the_smaller_of_the_clusters_and_the_tasks_depth(
    depth: int, limit: int | None, refused: bool
) -> None:
    split = Split(parent="p", depth=depth, deadline=0) if depth else None
    env = parent(ad={"limits": Limits(max_depth=limit)}, split=split)
    if refused:
        with pytest.raises(
            InvalidTask, match=f"{depth + 1} deep, and max_depth is {min(2, limit or 0) if limit is not None else 2}"
        ):
            delegated_envelope(env, ad(task_id="c"), CONFIG)
    else:
        assert delegated_envelope(env, ad(task_id="c"), CONFIG).depth == depth + 1


@pytest.mark.parametrize("fault", [{"description": " "}, {"context": {"k": "x" * 40_000}}])
def test_an_ad_that_may_not_be_submitted_is_not_delegated_either(fault: dict[str, Any]) -> None:
    with pytest.raises(InvalidTask):
        delegated_envelope(parent(), replace(ad(task_id="c"), **fault), CONFIG)


def ended(*, below: bool = False, **facts: Any) -> TaskRecord:
    env = envelope(now=0.0, **facts)
    return TaskRecord(
        task_id=env.task_id, state="succeeded", envelope=env, admitted_at=0, ended_at=1, below_threshold=below
    )


def spent(tokens: int) -> RunResult:
    return RunResult(prompt_tokens=tokens)


def test_the_cost_of_work_includes_failed_attempts_and_counts_none_twice() -> None:
    result = RunResult(content="x", prompt_tokens=4, completion_tokens=3)
    split = Split(parent="p", depth=1, grant=100, deadline=0)
    asked = {"sense": PhaseUsage(requests=1, prompt_tokens=20, completion_tokens=2)}
    assert total_tokens(ended()) == 0
    assert total_tokens(ended(result=result)) == 7
    assert total_tokens(ended(result=result, attempt=2, spent=spent(10))) == 17
    assert total_tokens(ended(result=result, attempt=3, spent=spent(12), below=True)) == 12
    assert total_tokens(ended(result=result, phase_usage=asked)) == 29
    assert total_tokens(ended(result=result, split=split, budget=80)) == 20
    assert total_tokens(ended(result=result, split=split, budget=100)) == 7


def test_the_answer_to_a_run_has_all_costs_and_fits_a_message() -> None:
    result = RunResult(content="数" * 100_000, prompt_tokens=4, completion_tokens=3)
    answer = result_for_run(ended(result=result, spent=spent(10)))
    assert (answer.prompt_tokens, answer.completion_tokens, answer.truncated) == (14, 3, True)
    assert len(answer.content.encode()) <= 64 * 1024
