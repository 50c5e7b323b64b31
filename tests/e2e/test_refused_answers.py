"""Tasks with only refused answers: the results for Python, the command line and a delegating agent."""

import json
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.background import Cluster, background_cluster
from support.in_process import Loom
from support.nodes import node

from loom import AmoebaLoop, ClusterManager, LifecycleManager, LoopContext, RewardBus, Runtime, TaskAd
from loom.agents.host.delegation import delegate
from loom.compat.planner import TaskPlanner
from loom.compat.skill_registry import SkillNodeRegistry
from loom.schemas.errors import RejectedResult
from loom.schemas.run import RunRequest
from loom.types import AgentNode, UserMessage

ASKED = {"contains": ["Paris"]}
SORRY = "I cannot help with that."


async def refuses(text: str) -> str:
    return SORRY


async def answers(job: RunRequest) -> str:
    return f"It is {job.context.get('city', 'Lyon')}."


@pytest.fixture(scope="module")
def cluster(nats_url: str) -> Iterator[Cluster]:
    nodes = [node("one", answers), AgentNode(id="sorry", agent=refuses, domains=["refusals"])]
    with background_cluster(nats_url, f"t{secrets.token_hex(4)}", nodes) as cluster:
        yield cluster


async def test_python_gets_the_reason_and_the_best_refused_answer(here: Cluster) -> None:
    async with Runtime() as rt:
        with pytest.raises(
            RejectedResult, match=r"the result does not contain 'Paris' \(the best refused answer, of one\)"
        ) as caught:
            await rt.submit({"description": "capital of France", "accept": ASKED})
        best = caught.value.best_rejected
        assert (best.content, best.node_id, best.score, caught.value.partial) == (
            "It is Lyon.",
            "one",
            0.0,
            best.content,
        )
        (result,) = await rt.submit_many([{"description": "capital of France", "accept": ASKED}])
        assert (result.state, result.content, result.below_threshold) == ("failed", "", False)
        assert (await rt.submit({"description": "x", "accept": {**ASKED, "best_effort": True}})) == "It is Lyon."


@pytest.mark.slow
async def test_a_schema_that_no_answer_meets_is_a_rejected_result_with_the_validators_sentence(here: Cluster) -> None:
    async with Runtime() as rt:
        with pytest.raises(RejectedResult, match=r"JSON") as caught:
            await rt.submit("how many", returns=int)
    assert caught.value.partial == "It is Lyon."


async def test_an_amoeba_loop_ends_with_an_error_and_without_content(on_bus: tuple[str, str], phases: object) -> None:
    nodes = ClusterManager()
    nodes.add_node(node("sorry", refuses))
    loop = AmoebaLoop(nodes, RewardBus(), LifecycleManager(), TaskPlanner(None), SkillNodeRegistry())  # type: ignore[arg-type]
    events = [event async for event in loop.execute(LoopContext(messages=[UserMessage("capital of France")]))]
    error, done = events[-2:]
    assert (error.type, error.code, error.recoverable) == ("error", "rejected_result", False)  # type: ignore[union-attr]
    assert (done.type, done.content) == ("done", "")  # type: ignore[union-attr]


async def test_a_delegating_agent_receives_the_reason_and_the_answer(on_bus: tuple[str, str], phases: object) -> None:
    async def boss(job: RunRequest) -> str:
        try:
            await delegate("help", domain="helping")
        except Exception as error:  # noqa: BLE001 - what it is, is asserted
            return json.dumps([type(error).__name__, str(error), error.best_rejected.content])  # type: ignore[attr-defined]
        return "no error"

    rt = Runtime()
    rt.add_agent(boss, name="boss", domains=["bossing"])
    rt.add_agent(refuses, name="sorry", domains=["helping"])
    async with rt:
        kind, message, refused = json.loads(await rt.submit(TaskAd(domain="bossing", description="x")))
    assert (kind, refused) == ("SubtaskFailed", SORRY)
    assert "rejected_result" in message


# -- the command line


def test_run_and_the_views_count_and_show_refused_answers_as_failures(
    here: Cluster, loom: Loom, tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    ads = [
        {"task_id": "strict", "description": "capital of France", "accept": ASKED},
        {"task_id": "lenient", "description": "capital of France", "accept": {**ASKED, "best_effort": True}},
        {"task_id": "good", "description": "capital of France", "context": {"city": "Paris"}, "accept": ASKED},
    ]
    tasks.write_text("\n".join(map(json.dumps, ads)))
    ended = loom(f"run {tasks} --out {tmp_path / 'results.jsonl'}")
    assert ended.code == 1
    assert "2 of 3 succeeded (1 with the best of refused answers)" in ended.out
    assert "rejected_result" in ended.out

    shown = loom("task show strict").out
    assert "strict  failed after" in shown
    assert "Error: rejected_result: the result does not contain 'Paris'" in shown
    assert "Best refused answer (one)\nIt is Lyon." in shown
    assert "short of what was asked" in loom("task show lenient").out
    assert "Answer, the best of those refused" in loom("task show lenient").out
    assert "rejected_result: the" in loom("task ls --state failed").out


def test_submit_prints_the_error_and_where_the_refused_answer_is(here: Cluster, loom: Loom) -> None:
    ended = loom("submit capital --node sorry")
    assert (ended.code, ended.out) == (1, "")
    note, error = ended.err.splitlines()
    assert re.fullmatch(r"a refused answer of sorry is kept: `loom task show \w+` shows it, --json has all of it", note)
    assert error == "rejected_result: the agent refuses the task (the best refused answer, of sorry)"
    answer = json.loads(loom("submit capital --node sorry --json").out)
    assert (answer["state"], answer["error"]["best_rejected"]["content"]) == ("failed", SORRY)
