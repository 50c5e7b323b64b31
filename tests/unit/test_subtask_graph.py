import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from loom.phases.scale import subtask_graph
from loom.phases.scale.planner import check_plan_size
from loom.phases.scale.planner import plan_from_ad as given_plan
from loom.schemas.auction import Award
from loom.schemas.base import MAX_INPUTS_BYTES, MAX_MESSAGE_BYTES, decode, encode
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope, RejectedResult, Spec, Split
from loom.schemas.errors import InvalidPlan
from loom.schemas.plan import SplitPlan, Subtask
from loom.schemas.record import TaskRecord
from loom.schemas.task import Limits, PhaseUsage, RunResult, TaskAd, TaskError

CONFIG = ClusterConfig()


def parent(budget: int | None = None, complexity: float = 0.3, **facts: Any) -> Envelope:
    given = {
        name: facts.pop(name) for name in ("context", "limits", "node_id", "tools_allowed", "labels") if name in facts
    }
    ad = TaskAd(task_id="p", description="all of it", **given)
    spec = Spec(complexity=complexity, domains=("code",), method="given")
    award = Award(node_id="n1", host_id="h1")
    return Envelope(ad=ad, spec=spec, award=award, deadline=1000.0, budget=budget, **facts)


def part(name: str, *needs: str, **facts: Any) -> Subtask:
    return Subtask(id=name, description=f"do {name}", dependencies=needs, **facts)


def ended(plan: SplitPlan, name: str, state: Any = "succeeded", tokens: int = 0, **facts: Any) -> TaskRecord:
    """Return the record of an ended subtask."""
    (one,) = [each for each in plan.subtasks if each.id == name]
    child = subtask_graph.child_envelope(plan, one, {}, 0.0)
    error = None if state == "succeeded" else TaskError(code=facts.pop("code", "agent_failed"), message="no")
    result = RunResult(content=f"out {name}", completion_tokens=tokens) if state == "succeeded" else None
    left = None if one.grant is None else max(0, one.grant - tokens)
    below_threshold = facts.pop("below_threshold", False)
    child = replace(child, **{"result": result, "error": error, "budget": left, **facts})
    return TaskRecord(
        task_id=child.task_id,
        state=state,
        envelope=child,
        admitted_at=1.0,
        ended_at=3.0,
        below_threshold=below_threshold,
    )


def by_name(plan: SplitPlan) -> dict[str, Subtask]:
    return {each.id: each for each in plan.subtasks}


@st.composite
def dags(draw: st.DrawFn) -> tuple[Subtask, ...]:
    """Any graph of up to 12 subtasks, in any order."""
    names = [f"s{n}" for n in range(draw(st.integers(1, 12)))]
    parts = [
        part(
            name,
            *draw(st.lists(st.sampled_from(names[:n]), max_size=3)) if n else (),
            estimated_complexity=draw(st.floats(0, 1)),
        )
        for n, name in enumerate(names)
    ]
    return tuple(draw(st.permutations(parts)))


# -- whatever the graph and the order of ends


@given(dags(), st.one_of(st.none(), st.integers(1, 5000)), st.randoms(use_true_random=False), st.data())
def test_every_plan_ends_and_every_subtask_starts_after_its_dependencies(
    parts: Sequence[Subtask], budget: int | None, dice: random.Random, data: st.DataObject
) -> None:
    may_fail = data.draw(st.booleans())
    plan = subtask_graph.start_plan(parent(budget), parts)
    begun: list[str] = [each.id for each in subtask_graph.running_subtasks(plan)]
    while plan.state == "running":
        running = subtask_graph.running_subtasks(plan)
        assert running, "a running plan without running subtasks would never end"
        one = dice.choice(running)
        for need in one.dependencies:
            assert by_name(plan)[need].state == "succeeded"
        state = "failed" if may_fail and dice.random() < 0.1 else "succeeded"
        record = ended(plan, one.id, state, tokens=dice.randint(0, one.grant or 0))
        after = subtask_graph.record_child(plan, record)
        assert after != plan
        assert subtask_graph.record_child(after, record) == after, "recorded twice"
        new = [each.id for each in subtask_graph.running_subtasks(after) if each.id not in {old.id for old in running}]
        assert set(new) <= {each.id for each in subtask_graph.unblocked_by(after, record.task_id)}
        begun += new
        plan = after
    assert len(begun) == len(set(begun))
    if plan.state == "joining":
        assert {each.state for each in plan.subtasks} == {"succeeded"}
        assert sorted(begun) == sorted(each.id for each in parts)
    else:
        assert subtask_graph.plan_error(plan) is not None


@given(dags(), st.integers(1000, 50_000), st.randoms(use_true_random=False))
def test_grants_never_exceed_the_rest_and_the_synthesis_keeps_its_share(
    parts: Sequence[Subtask], budget: int, dice: random.Random
) -> None:
    plan = subtask_graph.start_plan(parent(budget), parts)
    while plan.state == "running":
        left = subtask_graph.tokens_left(plan)
        assert left is not None
        lent = sum(each.grant or 0 for each in subtask_graph.running_subtasks(plan))
        assert lent <= left - subtask_graph.SYNTHESIS_SHARE * budget
        one = dice.choice(subtask_graph.running_subtasks(plan))
        plan = subtask_graph.record_child(plan, ended(plan, one.id, tokens=dice.randint(0, one.grant or 0)))
    assert plan.state == "joining"
    joined = subtask_graph.synthesis_envelope(plan, {})
    used = sum(each.tokens for each in plan.subtasks)
    assert joined.budget == budget - used
    assert joined.budget >= subtask_graph.SYNTHESIS_SHARE * budget


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=200), max_size=12), st.integers(1, 4000))
def test_inputs_fit_in_their_order_and_short_ones_stay_whole(texts: dict[str, str], times: int) -> None:
    inputs = {name: text * times for name, text in texts.items()}
    fitted = subtask_graph.fit_inputs(inputs)
    assert list(fitted) == list(inputs)
    assert sum(len(encode(text)) for text in fitted.values()) <= MAX_INPUTS_BYTES
    for name, text in inputs.items():
        assert text.startswith(fitted[name])
        if len(encode(text)) <= MAX_INPUTS_BYTES // max(1, len(inputs)):
            assert fitted[name] == text


# -- budgets


def test_unused_tokens_of_a_subtask_return_to_the_next() -> None:
    plan = subtask_graph.start_plan(parent(1000), [part("a"), part("b", "a")])
    assert by_name(plan)["a"].grant == 400
    plan = subtask_graph.record_child(plan, ended(plan, "a", tokens=100))
    assert by_name(plan)["b"].grant == 700  # 900 are left, 200 of them for the synthesis


def test_a_chain_leaves_the_synthesis_its_fifth_however_long_it_is() -> None:
    names = [f"s{n}" for n in range(8)]
    plan = subtask_graph.start_plan(
        parent(1000), [part(name, *names[max(0, n - 1) : n]) for n, name in enumerate(names)]
    )
    for name in names:
        plan = subtask_graph.record_child(plan, ended(plan, name, tokens=by_name(plan)[name].grant or 0))
    assert plan.state == "joining"
    assert subtask_graph.synthesis_envelope(plan, {}).budget == pytest.approx(200, abs=8)


def test_a_harder_subtask_gets_more() -> None:
    plan = subtask_graph.start_plan(
        parent(1000), [part("a", estimated_complexity=0.9), part("b", estimated_complexity=0.1)]
    )
    assert by_name(plan)["a"].grant == 666
    assert by_name(plan)["b"].grant == 133


def test_without_a_budget_there_are_no_limits() -> None:
    plan = subtask_graph.start_plan(parent(), [part("a"), part("b", "a")])
    plan = subtask_graph.record_child(plan, ended(plan, "a", tokens=10**6))
    assert (by_name(plan)["a"].tokens, by_name(plan)["b"].grant) == (10**6, None)
    assert plan.state == "running"


def test_a_budget_that_is_spent_fails_the_plan_at_once() -> None:
    plan = subtask_graph.start_plan(parent(1000), [part("a"), part("b", "a"), part("c", "b")])
    plan = subtask_graph.record_child(plan, ended(plan, "a", tokens=1000))
    error = subtask_graph.plan_error(plan)
    assert error is not None
    assert (plan.state, error.code) == ("done", "budget_exceeded")
    assert by_name(plan)["b"].state == "waiting"


def test_a_budget_too_small_to_share_is_spent_from_the_beginning() -> None:
    plan = subtask_graph.start_plan(parent(8), [part(f"s{n}") for n in range(16)])
    error = subtask_graph.plan_error(plan)
    assert error is not None
    assert (plan.state, error.code) == ("done", "budget_exceeded")


@pytest.mark.parametrize(
    ("facts", "used"),
    [
        ({}, 40),
        ({"spent": RunResult(prompt_tokens=25)}, 65),
        ({"phase_usage": {"sense": PhaseUsage(requests=1, completion_tokens=3)}}, 43),
        ({"budget": 100}, 300),  # something else has taken from its grant
        ({"budget": None}, 40),
    ],
)
def test_every_token_a_child_has_used_counts(facts: dict[str, Any], used: int) -> None:
    plan = subtask_graph.start_plan(parent(1000), [part("a"), part("b")])
    assert by_name(plan)["a"].grant == 400
    plan = subtask_graph.record_child(plan, ended(plan, "a", tokens=40, **facts))
    assert by_name(plan)["a"].tokens == used


def test_the_best_of_refused_results_is_counted_as_the_attempt_it_was() -> None:
    plan = subtask_graph.start_plan(parent(), [part("a"), part("b")])
    best = RunResult(content="nearly", completion_tokens=30)
    record = ended(
        plan,
        "a",
        spent=RunResult(completion_tokens=30),
        result=best,
        best_rejected=RejectedResult(result=best, node_id="n7", host_id="h"),
        below_threshold=True,
    )
    one = by_name(subtask_graph.record_child(plan, record))["a"]
    assert (one.state, one.tokens, one.node_id) == ("succeeded", 30, "n7")


def test_a_subtask_with_only_refused_answers_fails_and_the_plan_has_no_answer() -> None:
    plan = subtask_graph.start_plan(parent(), [part("a"), part("b")])
    best = RejectedResult(result=RunResult(content="nearly"), reason="too short", node_id="n7", host_id="h")
    record = replace(ended(plan, "a", "failed", best_rejected=best), rejected=True)
    assert record.error is not None
    assert record.error.best_rejected == best.to_rejected()
    plan = subtask_graph.record_child(plan, record)
    error = by_name(plan)["a"].error
    assert error == replace(record.error, best_rejected=None)
    why = subtask_graph.plan_error(plan)
    assert why is not None
    assert why.message.startswith("subtask a ended with rejected_result: too short (the best refused answer")


def test_the_tokens_of_a_childs_own_subtasks_count() -> None:
    plan = subtask_graph.start_plan(parent(), [part("a"), part("b")])
    below = subtask_graph.start_plan(parent(), [part("x"), part("y")])
    below = subtask_graph.record_child(below, ended(below, "x", tokens=7))
    plan = subtask_graph.record_child(
        plan, ended(plan, "a", tokens=5, spent=subtask_graph.synthesis_envelope(below, {}).spent)
    )
    assert by_name(plan)["a"].tokens == 12


def test_a_joined_task_has_the_tokens_of_its_parts_and_a_matching_budget() -> None:
    plan = subtask_graph.start_plan(parent(1000), [part("a"), part("b")])
    for name in ("a", "b"):
        plan = subtask_graph.record_child(plan, ended(plan, name, tokens=40))
    task = subtask_graph.synthesis_envelope(plan, {})
    assert (task.spent.completion_tokens, task.budget) == (80, 920)
    assert subtask_graph.synthesis_envelope(plan, {}) == task, "the same for a twin"


# -- failures


def test_a_failed_subtask_fails_the_plan_with_the_reason() -> None:
    plan = subtask_graph.start_plan(parent(), [part("a"), part("b"), part("c", "a", "b")])
    plan = subtask_graph.record_child(plan, ended(plan, "a", "failed", code="node_lost"))
    error = subtask_graph.plan_error(plan)
    assert error is not None
    assert (plan.state, error.code, error.message) == ("done", "subtask_failed", "subtask a ended with node_lost: no")
    assert [each.state for each in plan.subtasks] == ["failed", "running", "waiting"]
    assert plan.error == error
    after = subtask_graph.record_child(plan, ended(plan, "b"))
    assert (after.state, after.error) == ("done", error), "what comes after the end changes only its own part"
    assert [each.state for each in after.subtasks] == ["failed", "succeeded", "waiting"]


@pytest.mark.parametrize("code", ["deadline_exceeded", "budget_exceeded"])
def test_a_deadline_and_a_budget_are_the_parents_own(code: str) -> None:
    plan = subtask_graph.start_plan(parent(), [part("a"), part("b")])
    error = subtask_graph.plan_error(subtask_graph.record_child(plan, ended(plan, "a", "failed", code=code)))
    assert error == TaskError(code=code, message="subtask a: no")


def test_a_cancelled_subtask_fails_the_plan() -> None:
    plan = subtask_graph.start_plan(parent(), [part("a"), part("b")])
    error = subtask_graph.plan_error(subtask_graph.record_child(plan, ended(plan, "a", "cancelled", code="cancelled")))
    assert error is not None
    assert (error.code, error.message) == ("subtask_failed", "subtask a ended with cancelled: no")


def test_a_running_record_and_a_foreign_record_change_nothing() -> None:
    plan = subtask_graph.start_plan(parent(), [part("a"), part("b")])
    record = ended(plan, "a")
    assert subtask_graph.record_child(plan, replace(record, state="running")) == plan
    assert subtask_graph.record_child(plan, replace(record, task_id="other")) == plan


# -- children


def test_a_child_has_its_own_id_and_its_parents_deadline_priority_and_context() -> None:
    given: dict[str, Any] = {"limits": Limits(max_depth=1), "tools_allowed": ("add",), "labels": {"tenant": "a"}}
    env = parent(1000, context={"plan": [1], "repo": "x"}, trace="00-ab-cd-01", **given)
    plan = subtask_graph.start_plan(env, [part("a"), part("b", "a", domain="data", estimated_complexity=0.4)])
    plan = subtask_graph.record_child(plan, ended(plan, "a"))
    child = subtask_graph.child_envelope(plan, by_name(plan)["b"], {"a": "out a", "z": "no"}, now=900.0)
    assert child.task_id == subtask_graph.child_id("p", "b") != subtask_graph.child_id("p", "a")
    assert (child.ad.domain, child.ad.description, child.ad.estimated_complexity) == ("data", "do b", 0.4)
    assert (child.ad.context, child.ad.limits, child.ad.timeout_s) == ({"repo": "x"}, Limits(max_depth=1), 100.0)
    assert (child.ad.tools_allowed, child.ad.labels) == (("add",), {"tenant": "a"})
    assert (child.deadline, child.trace, child.budget) == (1000.0, "00-ab-cd-01", child.ad.token_budget)
    assert child.split == Split(
        parent="p", depth=1, subtask="b", grant=child.budget, deadline=1000.0, inputs={"a": "out a"}
    )
    assert decode(encode(child), Envelope) == child


def test_a_nested_part_is_deeper_and_has_the_inputs_of_its_parent() -> None:
    split = Split(parent="g", depth=1, subtask="p", deadline=1000.0, inputs={"before": "it", "a": "theirs"})
    plan = subtask_graph.start_plan(parent(split=split), [part("a"), part("b", "a")])
    first = subtask_graph.child_envelope(plan, by_name(plan)["a"], {}, 0.0)
    second = subtask_graph.child_envelope(plan, by_name(plan)["b"], {"a": "ours"}, 0.0)
    assert first.split is not None
    assert second.split is not None
    assert (first.depth, first.split.inputs) == (2, {"before": "it", "a": "theirs"})
    assert second.split.inputs == {"before": "it", "a": "ours"}


# -- what is too large


def largest_plan() -> tuple[Subtask, ...]:
    """Return 64 subtasks of the largest allowed size, in characters that are long in JSON."""
    return tuple(part(f"s{n}", domain="d", estimated_complexity=0.1) for n in range(64))


def test_the_largest_plan_of_a_client_is_readable_with_all_notes() -> None:
    parts = largest_plan()
    room = (32 * 1024 - len(encode(parts))) // 64 // 6
    parts = tuple(replace(each, description=each.description + "\x01" * room) for each in parts)
    config = ClusterConfig(max_subtasks=64)
    env = parent(10**8, context={"k": "v" * 32_000}, inputs={"a": "\x01" * 10_000}, best_rejected=None)
    env = replace(env, ad=replace(env.ad, description="\x01" * 5000), trace="t" * 256)
    plan = subtask_graph.start_plan(env, check_plan_size(parts, config))
    for each in parts[:-1]:
        plan = subtask_graph.record_child(
            plan, ended(plan, each.id, award=Award(node_id="n" * 64, host_id="h" * 64), tokens=10**4)
        )
    why = TaskError(code="agent_failed", message="\x01" * 2000)
    plan = subtask_graph.record_child(plan, ended(plan, parts[-1].id, "failed", error=why))
    assert plan.state == "done"
    assert len(encode(plan)) < MAX_MESSAGE_BYTES / 2
    assert decode(encode(plan), SplitPlan) == plan


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        (largest_plan(), "64 subtasks, at most 16"),
        ((part("a"), replace(part("b"), description="x" * 33_000)), "bytes of JSON, at most 32768"),
        ((replace(part("a"), description="half of \ud83d"),), "not Unicode"),
    ],
)
def test_a_plan_that_is_too_large_or_cannot_be_written_is_refused(parts: tuple[Subtask, ...], complaint: str) -> None:
    with pytest.raises(InvalidPlan, match=complaint):
        check_plan_size(parts, CONFIG)


def test_a_plan_may_be_given_as_a_list_as_an_object_or_as_text() -> None:
    parts = [{"id": "a", "description": "x"}]
    for form in (parts, {"subtasks": parts}, '```json\n[{"id": "a", "description": "x"}]\n```'):
        assert given_plan(TaskAd(context={"plan": form}), CONFIG) == (Subtask(id="a", description="x"),)
    for form in (True, False, None):
        assert given_plan(TaskAd(context={"plan": form}), CONFIG) is None


# -- after a plan is done


@given(dags(), st.randoms(use_true_random=False), st.booleans())
def test_a_done_plan_records_ends_of_subtasks_and_changes_nothing_else(
    parts: Sequence[Subtask],
    dice: random.Random,
    parent_ended: bool,
) -> None:
    plan = subtask_graph.start_plan(parent(), parts)
    if parent_ended:
        done = subtask_graph.finish(plan)
    else:
        done = subtask_graph.record_child(
            plan, ended(plan, dice.choice(subtask_graph.running_subtasks(plan)).id, "failed")
        )
        assert done.error == subtask_graph.plan_error(done)
    after = done
    for one in dice.sample(subtask_graph.running_subtasks(done), len(subtask_graph.running_subtasks(done))):
        record = ended(done, one.id, dice.choice(["succeeded", "failed", "cancelled"]))
        after = subtask_graph.record_child(after, record)
        assert by_name(after)[one.id].state == record.state
        assert subtask_graph.record_child(after, record) == after, "a second time"
    assert subtask_graph.running_subtasks(after) == []
    assert (after.state, after.error) == ("done", done.error)
    untouched = {each.id for each in done.subtasks if each.state != "running"}
    assert all(by_name(after)[name] == by_name(done)[name] for name in untouched)
