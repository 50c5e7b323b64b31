import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.compat.planner import TaskPlanner
from loom.schemas.errors import BudgetExceeded, InvalidPlan
from loom.schemas.plan import PLAN_SCHEMA, check_graph, parse_plan
from loom.types import (
    CompletionParams,
    CompletionResult,
    LLMProvider,
    StreamChunk,
    SubTask,
    TaskAd,
    TaskError,
    TaskResult,
    Usage,
)

AD = TaskAd(task_id="t", domain="code", description="build it", estimated_complexity=0.9)


class Scripted:
    """A provider that gives these answers, repeats the last one, or raises them, and records its requests."""

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = answers or ("",)
        self.asked: list[CompletionParams] = []

    async def complete(self, params: CompletionParams) -> CompletionResult:
        answer = self.answers[min(len(self.asked), len(self.answers) - 1)]
        self.asked.append(params)
        if isinstance(answer, Exception):
            raise answer
        return CompletionResult(content=answer, usage=Usage(prompt_tokens=100, completion_tokens=10))

    def stream(self, params: CompletionParams) -> AsyncIterator[StreamChunk]:
        raise NotImplementedError


def part(name: str, *dependencies: str) -> SubTask:
    return SubTask(id=name, description=f"do {name}", dependencies=list(dependencies))


def plan(*parts: SubTask) -> list[dict[str, Any]]:
    return [{"id": p.id, "description": p.description, "dependencies": p.dependencies} for p in parts]


def good(name: str, content: str = "", tokens: int = 0) -> TaskResult:
    return TaskResult(task_id=name, state="succeeded", content=content or f"out {name}", prompt_tokens=tokens)


def bad(name: str, tokens: int = 0) -> TaskResult:
    error = TaskError(code="agent_failed", message="no")
    return TaskResult(task_id=name, state="failed", error=error, prompt_tokens=tokens)


async def decompose(answer: str) -> list[SubTask]:
    return await TaskPlanner(Scripted(answer)).decompose(AD)


def code_of(result: TaskResult) -> str | None:
    return result.error.code if result.error else None


# --- the graph


def test_a_diamond_is_a_graph() -> None:
    check_graph([part("d", "b", "c"), part("b", "a"), part("c", "a"), part("a")])


@pytest.mark.parametrize(
    ("parts", "complaint", "field"),
    [
        ([], "no subtasks", "subtasks"),
        ([part("a"), part("a")], "duplicate subtask id a", "id"),
        ([part("a", "x")], "subtask a has the unknown dependency x", "dependencies"),
        ([part("a", "b"), part("b", "a")], "form a cycle", "dependencies"),
        ([part("a", "a")], "form a cycle", "dependencies"),
    ],
)
def test_each_broken_rule_has_its_own_complaint(parts: list[SubTask], complaint: str, field: str) -> None:
    with pytest.raises(InvalidPlan, match=complaint) as caught:
        check_graph(parts)
    assert caught.value.field == field


@given(st.data())
def test_a_graph_is_accepted_exactly_when_it_has_an_order(data: st.DataObject) -> None:
    names = [str(i) for i in range(data.draw(st.integers(1, 7)))]
    parts = [part(name, *data.draw(st.lists(st.sampled_from(names), max_size=3))) for name in names]

    done: set[str] = set()
    while ready := {p.id for p in parts if p.id not in done and done.issuperset(p.dependencies)}:
        done |= ready
    if done == set(names):
        check_graph(parts)
    else:
        with pytest.raises(InvalidPlan):
            check_graph(parts)


# --- the model's answer


@pytest.mark.parametrize(
    "frame",
    [
        "%s",
        "```json\n%s\n```",
        "Here is [my] plan:\n```\n%s\n```\nGood luck {you}!",
        '{"subtasks": %s}',
        'I thought about [1, 2] first. {"subtasks": %s}',
    ],
)
async def test_a_plan_is_found_in_any_frame(frame: str) -> None:
    subtasks = await decompose(frame % json.dumps(plan(part("a"), part("b", "a"))))

    assert [(s.id, s.description, s.dependencies) for s in subtasks] == [("a", "do a", []), ("b", "do b", ["a"])]


async def test_a_part_without_a_domain_gets_the_tasks() -> None:
    (only,) = await decompose('[{"id": "a", "description": "x"}]')
    (other,) = await decompose('[{"id": "a", "description": "x", "domain": "data", "estimated_complexity": 0.7}]')

    assert (only.domain, only.estimated_complexity) == ("code", 0.3)
    assert (other.domain, other.estimated_complexity) == ("data", 0.7)


async def test_numbered_parts_are_accepted() -> None:
    answer = '[{"id": 1, "description": "x"}, {"id": 2, "description": "y", "dependencies": [1]}]'

    assert [(s.id, s.dependencies) for s in await decompose(answer)] == [("1", []), ("2", ["1"])]


async def test_a_long_plan_loses_no_part_and_no_dependency() -> None:
    chain = [part("p0"), *(part(f"p{i}", f"p{i - 1}") for i in range(1, 12))]
    subtasks = await decompose(json.dumps(plan(*chain)))

    assert [s.id for s in subtasks] == [s.id for s in chain]
    check_graph(subtasks)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I cannot do that.",
        "[]",
        '{"subtasks": []}',
        '["a", "b"]',
        '[{"id": "a", "description": "x"',
        '[{"id": "a"}]',
        '[{"id": "a", "description": "  "}]',
        '[{"id": "two words", "description": "x"}]',
        '[{"id": "a", "description": "x", "estimated_complexity": "high"}]',
        '[{"id": "a", "description": "x", "estimated_complexity": NaN}]',
        json.dumps(plan(part("a"), part("a"))),
        json.dumps(plan(part("a", "missing"))),
        json.dumps(plan(part("a", "b"), part("b", "a"))),
    ],
)
async def test_an_answer_of_no_use_leaves_the_task_whole(answer: str) -> None:
    (whole,) = await decompose(answer)

    assert (whole.description, whole.domain, whole.estimated_complexity) == ("build it", "code", 0.9)
    assert whole.dependencies == []


@pytest.mark.timeout(5)
async def test_deeply_nested_brackets_are_refused_at_once() -> None:
    (whole,) = await decompose("[" * 100_000)

    assert whole.description == "build it"


@pytest.mark.slow
@given(st.text() | st.recursive(st.none() | st.text() | st.floats() | st.integers(), st.lists).map(json.dumps))
def test_no_text_breaks_the_reader(text: str) -> None:
    with pytest.raises(InvalidPlan):
        parse_plan(text)


async def test_the_request_has_the_json_schema_of_the_plan() -> None:
    provider = Scripted(json.dumps(plan(part("a"))))
    await TaskPlanner(provider).decompose("just words")

    (asked,) = provider.asked
    assert isinstance(provider, LLMProvider)
    assert (asked.temperature, asked.json_schema) == (0.3, PLAN_SCHEMA)
    assert [message.role for message in asked.messages] == ["system", "user"]
    assert asked.messages[-1].content == "just words"


async def test_a_bad_plan_is_sent_back_once_with_its_faults() -> None:
    bad_plan = json.dumps(plan(part("a", "missing")))
    provider = Scripted(bad_plan, json.dumps(plan(part("a"), part("b", "a"))))
    subtasks = await TaskPlanner(provider).decompose(AD)

    assert [subtask.id for subtask in subtasks] == ["a", "b"]
    first, second = provider.asked
    assert second.messages[: len(first.messages)] == first.messages
    assert second.messages[-2].content == bad_plan
    assert "subtask a has the unknown dependency missing" in second.messages[-1].content


async def test_a_model_that_takes_too_long_leaves_the_task_whole() -> None:
    class Silent(Scripted):
        async def complete(self, params: CompletionParams) -> CompletionResult:
            self.asked.append(params)
            await asyncio.Event().wait()
            raise AssertionError

    provider = Silent()
    (whole,) = await TaskPlanner(provider).decompose(TaskAd(description="build it", timeout_s=0.05))

    assert whole.description == "build it"
    assert len(provider.asked) == 1


async def test_a_providers_error_reaches_the_caller() -> None:
    with pytest.raises(BudgetExceeded):
        await TaskPlanner(Scripted(BudgetExceeded("spent"))).decompose(AD)


# --- running the parts


class Runner:
    """Executes subtasks, fails the named ones, and records the inputs of each."""

    def __init__(self, *, failing: Sequence[str] = (), raising: BaseException | None = None) -> None:
        self.failing, self.raising = failing, raising
        self.inputs: dict[str, dict[str, str]] = {}

    async def __call__(self, subtask: SubTask, inputs: dict[str, str]) -> TaskResult:
        self.inputs[subtask.id] = inputs
        if subtask.id not in self.failing:
            return good(subtask.id)
        if self.raising is not None:
            raise self.raising
        return bad(subtask.id)


planner = TaskPlanner(Scripted())


async def test_dependents_get_the_outputs_of_their_dependencies_and_no_others() -> None:
    runner = Runner()
    results = await planner.execute_dag([part("c", "a", "b"), part("a"), part("b", "a"), part("d")], runner)

    assert runner.inputs == {"a": {}, "d": {}, "b": {"a": "out a"}, "c": {"a": "out a", "b": "out b"}}
    assert list(results) == ["c", "a", "b", "d"]
    assert all(result.success for result in results.values())


@pytest.mark.parametrize(
    ("raising", "code"),
    [
        (None, "agent_failed"),
        (RuntimeError("key sk-123"), "agent_failed"),
        (BudgetExceeded("spent"), "budget_exceeded"),
        (TimeoutError(), "agent_failed"),
        (asyncio.CancelledError(), "cancelled"),
    ],
)
async def test_dependents_of_a_failure_are_not_run_and_the_rest_is(raising: BaseException | None, code: str) -> None:
    runner = Runner(failing=["a"], raising=raising)
    results = await planner.execute_dag([part("a"), part("b", "a"), part("c", "b"), part("d")], runner)

    assert set(runner.inputs) == {"a", "d"}
    assert [code_of(result) for result in results.values()] == [code, "subtask_failed", "subtask_failed", None]
    assert (results["b"].attempts, results["c"].attempts) == (0, 0)
    assert results["b"].error is not None
    assert "a, which did not succeed" in results["b"].error.message
    assert results["a"].error is not None
    assert "sk-123" not in results["a"].error.message


async def test_a_part_starts_as_soon_as_its_own_dependencies_are_done() -> None:
    last_has_run = asyncio.Event()

    async def execute(subtask: SubTask, _inputs: dict[str, str]) -> TaskResult:
        if subtask.id == "slow":
            await last_has_run.wait()
        if subtask.id == "last":
            last_has_run.set()
        return good(subtask.id)

    async with asyncio.timeout(5):
        results = await planner.execute_dag([part("slow"), part("first"), part("last", "first")], execute)
    assert all(result.success for result in results.values())


async def test_a_graph_that_breaks_a_rule_runs_nothing() -> None:
    runner = Runner()
    for broken in ([part("a"), part("b", "b")], [part("a"), part("b", "x")], [part("a"), part("a")], []):
        with pytest.raises(InvalidPlan):
            await planner.execute_dag(broken, runner)
    assert runner.inputs == {}


async def test_cancelling_the_run_cancels_its_parts() -> None:
    started, stopped = asyncio.Event(), []

    async def execute(subtask: SubTask, _inputs: dict[str, str]) -> TaskResult:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(subtask.id)
        return good(subtask.id)

    run = asyncio.create_task(planner.execute_dag([part("a"), part("b", "a"), part("c")], execute))
    await started.wait()
    run.cancel()

    with pytest.raises(asyncio.CancelledError):
        await run
    assert sorted(stopped) == ["a", "c"]


# --- putting outputs together


async def test_outputs_are_put_together_by_the_model_and_every_token_is_counted() -> None:
    provider = Scripted("the answer")
    answer = await TaskPlanner(provider).aggregate(AD, {"a": good("a", tokens=5), "b": good("b", tokens=7)})

    assert (answer.task_id, answer.state, answer.content) == ("t", "succeeded", "the answer")
    assert (answer.prompt_tokens, answer.completion_tokens) == (112, 10)
    (asked,) = provider.asked
    assert asked.messages[-1].content == "build it\n\n[a] out a\n---\n[b] out b"
    assert (asked.temperature, asked.max_tokens) == (0.3, 2048)


async def test_a_task_with_only_failed_parts_fails_with_its_cost() -> None:
    provider = Scripted("all went well")
    answer = await TaskPlanner(provider).aggregate(AD, {"a": bad("a", tokens=5), "b": bad("b", tokens=7)})

    assert (answer.success, code_of(answer), answer.content, answer.prompt_tokens) == (False, "subtask_failed", "", 12)
    assert provider.asked == []


async def test_empty_outputs_count_as_missing() -> None:
    answer = await TaskPlanner(Scripted("fine")).aggregate(AD, {"a": good("a", " "), "b": bad("b")})

    assert code_of(answer) == "subtask_failed"


async def test_the_model_is_informed_of_a_missing_part() -> None:
    provider = Scripted("as far as I know")
    answer = await TaskPlanner(provider).aggregate(AD, {"a": good("a"), "b": bad("b")})

    assert answer.success
    assert "[b] (missing: this subtask gave no result)" in provider.asked[0].messages[-1].content


async def test_a_single_output_is_the_answer_without_asking_the_model() -> None:
    provider = Scripted("something else")
    answer = await TaskPlanner(provider).aggregate(AD, {"a": good("a", tokens=5)})

    assert (answer.success, answer.content, answer.prompt_tokens) == (True, "out a", 5)
    assert provider.asked == []


async def test_an_empty_synthesis_is_a_failure() -> None:
    answer = await TaskPlanner(Scripted(" ")).aggregate(AD, {"a": good("a"), "b": good("b")})

    assert (answer.success, code_of(answer), answer.prompt_tokens) == (False, "agent_failed", 100)


@pytest.mark.parametrize(
    "text",
    [
        "{" * 32_000,
        '["' * 16_000,
        "[1," * 10_000,
        ("[" + "1," * 400) * 38,
        ("[" + "1," * 15) * 900,
        ("[" * 900 + "x") * 35,
        "[" + "9" * 31_000,
        "[] " * 10_000,
    ],
)
def test_text_that_holds_no_plan_is_read_in_a_moment(text: str) -> None:
    began = time.thread_time()
    with pytest.raises(InvalidPlan):
        parse_plan(text)
    assert time.thread_time() - began < 0.5  # quadratic work takes seconds


def test_a_plan_is_found_behind_brackets_of_prose() -> None:
    prose = "see [1], {x}, [the notes](n.md), f(a[i]) { return } " * 40
    assert [part.id for part in parse_plan(prose + '{"subtasks": [{"id": "a", "description": "do it"}]}')] == ["a"]


async def test_an_executor_without_an_argument_for_inputs_is_refused_before_any_run() -> None:
    ran: list[str] = []

    async def alone(subtask: SubTask) -> TaskResult:
        ran.append(subtask.id)
        return TaskResult(task_id=subtask.id, state="succeeded")

    with pytest.raises(TypeError, match=r"\(subtask, inputs\)"):
        await TaskPlanner(Scripted()).execute_dag([part("a")], alone)  # type: ignore[arg-type]
    assert ran == []


# --- what models and clients write instead of `dependencies`


@pytest.mark.parametrize("name", ["depends_on", "depends", "deps", "dependencies"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_dependencies_have_other_names(name: str, wrapped: bool) -> None:
    parts = [{"id": "a", "description": "x"}, {"id": "b", "description": "y", name: ["a"]}]
    read = parse_plan(json.dumps({"subtasks": parts} if wrapped else parts))
    assert [part.dependencies for part in read] == [(), ("a",)]


@pytest.mark.parametrize(
    ("written", "field", "complaint"),
    [
        ([{"id": "a", "description": "x", "depend_on": []}], "depend_on", "subtask a has the unknown field depend_on"),
        ({"subtasks": [{"id": "a", "description": "x"}], "goal": "y"}, "goal", "the plan has the unknown field goal"),
        ([{"id": "a", "description": "x", "deps": [], "dependencies": []}], "deps", "both dependencies and deps"),
        ([{"id": "a", "description": "x", "d\u00e9ps": []}], "d\\xe9ps", "unknown field"),
    ],
)
def test_a_field_that_is_not_known_is_an_error_that_names_it(written: Any, field: str, complaint: str) -> None:
    with pytest.raises(InvalidPlan, match=complaint) as caught:
        parse_plan(json.dumps(written))
    assert caught.value.field == field


def test_a_null_is_as_good_as_absent_and_a_number_may_be_a_text() -> None:
    parts = [{"id": 1, "description": "x", "domain": None, "dependencies": None, "estimated_complexity": "0.5"}]
    (read,) = parse_plan(json.dumps(parts))
    assert (read.id, read.domain, read.dependencies, read.estimated_complexity) == ("1", "", (), 0.5)


def test_a_plan_within_a_models_reasoning_is_not_its_answer() -> None:
    text = '<think>[{"id": "a", "description": "x"}]</think>[{"id": "b", "description": "y"}]'
    assert [part.id for part in parse_plan(text)] == ["b"]
