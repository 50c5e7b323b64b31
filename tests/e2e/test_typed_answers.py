"""Tasks submitted as texts, dicts or ads, and answers in the requested type."""

import asyncio
import json
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import Any, Literal

import pydantic
import pytest

from loom import InvalidTask, Job, Runtime, TaskAd
from loom.bus.bus import Bus
from loom.schemas.errors import AgentFailed, BudgetExceeded, RejectedResult
from loom.types import Accept

pytestmark = pytest.mark.usefixtures("on_bus", "phases")


@dataclass
class Point:
    x: int
    y: int


class Report(pydantic.BaseModel):
    title: str
    points: list[int]


def answering(content: Any) -> Runtime:
    rt = Runtime()
    rt.add_agent(lambda text: content, name="answers")  # noqa: ARG005 - an agent takes one argument
    return rt


async def test_the_answer_is_an_object_of_the_type() -> None:
    async with answering(Point(1, 2)) as rt:
        assert await rt.submit("where", returns=Point) == Point(1, 2)
    async with answering('{"title": "a", "points": [1]}') as rt:
        assert await rt.submit({"description": "report"}, returns=Report) == Report(title="a", points=[1])
    async with answering([1, 2]) as rt:
        assert await rt.submit(TaskAd(description="count"), returns=list[int]) == [1, 2]


async def test_a_bare_text_is_accepted_for_a_string() -> None:
    class Colour(Enum):
        RED = "red"

    async with answering("red") as rt:
        assert await rt.submit("which", returns=Literal["red", "blue"]) == "red"
        assert await rt.submit("which", returns=Colour) is Colour.RED
        with pytest.raises(RejectedResult):
            await rt.submit("which", returns=Literal["green"])
    async with answering("2024-05-01") as rt:
        assert await rt.submit("when", returns=date) == date(2024, 5, 1)
    async with answering(Colour.RED) as rt:
        assert await rt.submit("which", returns=Colour) is Colour.RED


async def test_the_job_has_the_schema_of_the_type() -> None:
    seen: list[Any] = []

    def answers(job: Job) -> Point:
        seen.append(job.accept)
        return Point(1, 2)

    rt = Runtime()
    rt.add_agent(answers)
    async with rt:
        await rt.submit("where", returns=Point)
    (accept,) = seen
    assert set(accept.json_schema["properties"]) == {"x", "y"}


async def test_an_answer_of_another_type_is_refused_with_the_validators_sentence() -> None:
    async with answering({"x": 1, "y": "two"}) as rt:
        with pytest.raises(RejectedResult, match=r"\$\.y|integer"):
            await rt.submit("where", returns=Point)


async def test_an_answer_valid_only_for_the_ads_own_schema_is_a_rejected_result() -> None:
    async with answering('{"x": 1}') as rt:
        with pytest.raises(RejectedResult, match="the answer is not a Point") as caught:
            await rt.submit(TaskAd(description="where", accept=Accept(json_schema={"type": "object"})), returns=Point)
    assert caught.value.partial == '{"x": 1}'


async def test_synchronous_code_gets_objects_too() -> None:
    def submits() -> Point:
        rt = answering(Point(3, 4))
        try:
            return rt.submit_sync("where", returns=Point)
        finally:
            rt.dispose()

    assert await asyncio.to_thread(submits) == Point(3, 4)


async def test_texts_and_dicts_are_accepted_wherever_tasks_are() -> None:
    rt = Runtime()
    rt.add_agent(lambda text: text.upper(), name="shouts")
    async with rt:
        assert await rt.submit("hello") == "HELLO"
        assert await (await rt.publish({"description": "hi", "domain": "code"})).content() == "HI"
        results = await rt.submit_many(["a", {"description": "b"}, TaskAd(description="c")])
        assert [result.content for result in results] == ["A", "B", "C"]
        with pytest.raises(InvalidTask, match="unknown field `priorty`"):
            await rt.submit({"description": "x", "priorty": "high"})


async def test_a_replaced_agent_and_a_removed_agent_get_no_more_work() -> None:
    rt = Runtime()
    rt.add_agent(lambda text: f"old {text}", name="worker")
    async with rt:
        assert await rt.submit(TaskAd(description="x", node_id="worker")) == "old x"
        rt.add_agent(lambda text: f"new {text}", name="worker", replace=True)
        assert await rt.submit(TaskAd(description="x", node_id="worker")) == "new x"
        rt.remove_agent("worker")
        rt.add_agent(lambda text: f"other {text}", name="other")
        assert await rt.submit("x") == "other x"


async def test_unpinned_work_goes_only_to_nodes_of_its_domain() -> None:
    rt = Runtime()
    rt.add_agent(lambda text: "csv", name="csv", domains=["csv"], capabilities={"csv": 1.0})  # noqa: ARG005
    rt.add_agent(lambda text: "any", name="any", capabilities={"law": 0.0})  # noqa: ARG005
    async with rt:
        answers = [await rt.submit(TaskAd(domain="sales", description=f"x{n}")) for n in range(3)]
        assert answers == ["any"] * 3
        assert await rt.submit(TaskAd(domain="law", description="x", node_id="csv")) == "csv"


async def test_the_costs_of_functions_are_in_the_result_and_bound_by_the_budget(client: Bus) -> None:
    def spends(job: Job) -> str:
        job.report(prompt_tokens=6, completion_tokens=2, cost_usd=0.5)
        return json.dumps("done")

    rt = Runtime()
    rt.add_agent(spends)
    async with rt:
        result = await (await rt.publish("x")).result()
        assert (result.prompt_tokens, result.completion_tokens) == (6, 2)
        with pytest.raises(BudgetExceeded, match="8 were used"):
            await rt.submit(TaskAd(description="x", token_budget=5))


async def test_agents_are_started_and_closed_by_a_runtime() -> None:
    steps: list[str] = []

    class Connected:
        async def start(self) -> None:
            steps.append("start")

        async def close(self) -> None:
            steps.append("close")

        async def run(self, text: str) -> str:
            steps.append(text)
            return text

    rt = Runtime()
    rt.add_agent(Connected())
    async with rt:
        await rt.submit("one")
        await rt.submit("two")
    assert steps == ["start", "one", "two", "close"]


async def test_an_agent_that_does_not_start_fails_its_task() -> None:
    class Broken:
        async def start(self) -> None:
            raise OSError("x")

        async def run(self, text: str) -> str:
            return text

    rt = Runtime()
    rt.add_agent(Broken(), name="broken")
    async with rt:
        with pytest.raises(AgentFailed, match="the agent did not start: its start raised OSError"):
            await rt.submit(TaskAd(description="x", node_id="broken"))
