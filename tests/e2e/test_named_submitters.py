"""A Runtime and commands with LOOM_SUBMITTER, on a server that refuses all but that submitter's subjects."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.accounts import PASSWORD, permitted
from support.command import LOOM, Ended, command
from support.configured import configured_server
from support.nodes import echo, node
from support.services import running_phases
from support.wait import until

from loom import (
    AmoebaLoop,
    ClusterManager,
    LifecycleManager,
    LoopContext,
    OpenAIProvider,
    RewardBus,
    Runtime,
    SkillNodeRegistry,
    delegate,
)
from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.bus.records import records
from loom.compat.planner import TaskPlanner
from loom.runner.services import running_nodes
from loom.runner.session import Session
from loom.runner.settings import from_environment
from loom.schemas.base import decode
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import PHASES
from loom.schemas.events import TextDelta
from loom.schemas.llm import UserMessage
from loom.schemas.record import TaskRecord
from loom.schemas.run import RunRequest
from loom.schemas.task import TaskResult
from loom.types import Done


async def endless(job: RunRequest) -> str:
    await asyncio.Event().wait()
    return job.description


@pytest.fixture
async def operator(tmp_path: Path) -> AsyncIterator[Bus]:
    """A cluster on a separate server, and a connection with all permissions."""
    async with configured_server(tmp_path, permitted(f"{tmp_path}/js", "ann")) as address:
        url = f"nats://loom:{PASSWORD}@{address}"
        config = ClusterConfig(drain_timeout_s=0.1)
        nodes = [node("coder", echo, code=0.9), node("sleeper", endless, sleep=0.9)]
        async with (
            running_phases(url, config=config),
            running_nodes(url, lambda: nodes, drain_timeout_s=0.1),
            Bus(url, role="operator") as bus,
        ):
            yield bus


@pytest.fixture
def ann(operator: Bus, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of ann's processes, this one among them."""
    environment = {"NATS_URL": operator.connection.url.replace("//loom:", "//ann:"), "LOOM_SUBMITTER": "ann"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment


async def record_of(operator: Bus, task_id: str) -> TaskRecord:
    entry = await records(operator).get(task_id)
    assert entry is not None
    return entry.value


async def test_a_runtime_submits_follows_and_cancels(
    operator: Bus, ann: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    async with Runtime() as rt:
        assert await rt.submit({"domain": "code", "description": "sort"}) == "done: sort"
        handle = await rt.publish({"task_id": "t1", "domain": "code", "description": "count"})
        texts = [delta.event.text async for delta in handle.events() if isinstance(delta.event, TextDelta)]
        assert "".join(texts) == "done: count"
        assert (await record_of(operator, "t1")).envelope.submitter == "ann"
        record = await handle.record()
        assert record is not None
        assert record.envelope.submitter == "ann"
        assert (await (await rt.publish({"domain": "sleep", "description": "x"})).cancel()).state == "cancelled"
    assert not [entry for entry in caplog.records if entry.name == "loom" and entry.levelname == "WARNING"]


@pytest.mark.slow
async def test_the_commands_of_a_submitter_need_no_more(operator: Bus, ann: dict[str, str], tmp_path: Path) -> None:
    async def run(*words: str) -> Ended:
        async with command(tmp_path, *LOOM, *words, **ann) as running:
            ended = await running.end()
        assert "permissions violation" not in ended.err.lower()
        return ended

    answered = await run("submit", "sort", "--domain", "code")
    assert (answered.code, answered.out) == (0, "done: sort\n")
    accepted = await run("submit", "rest", "--domain", "sleep", "--no-wait")
    task_id = accepted.out.strip()
    await until(lambda: record_exists(operator, task_id), what="the task is admitted")
    assert (await record_of(operator, task_id)).envelope.submitter == "ann"
    assert (await run("task", "cancel", task_id)).out == f"{task_id} cancelled\n"
    assert (await run("task", "cancel", "unknown")).err.startswith("unknown_task: no task unknown is known")

    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps({"domain": "code", "description": "count"}) + "\n")
    done = await run("run", str(tasks), "--out", str(tmp_path / "out.jsonl"))
    assert done.code == 0
    assert "1 of 1 succeeded" in done.out
    shown = await command_output(tmp_path, operator, "task", "show", task_id)
    assert "submitter ann" in shown


async def record_exists(operator: Bus, task_id: str) -> bool:
    return await records(operator).get(task_id) is not None


async def command_output(folder: Path, operator: Bus, *words: str) -> str:
    async with command(folder, *LOOM, *words, NATS_URL=operator.connection.url, COLUMNS="200") as running:
        return (await running.end()).out


async def part_or_whole(job: RunRequest) -> str:
    """An agent that delegates on request of the description."""
    if "delegate" in job.description:
        return f"with a {await delegate('sort', domain='code')}"
    return f"done: {job.description}"


async def test_all_parts_of_a_task_are_of_its_submitter_and_have_its_labels(
    on_bus: tuple[str, str], phases: Bus, client: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    results: dict[str, TaskResult] = {}
    submitters: set[str] = set()

    def on_message(msg: Msg) -> None:
        parsed = client.subjects.parse(msg.subject)
        submitters.add(parsed.tokens["submitter"] if parsed else msg.subject)
        if parsed is not None and parsed.family == "result":
            results[parsed.tokens["task_id"]] = decode(msg.data, TaskResult)

    for family in ("result", "delta"):
        await client.connection.subscribe_sync(client.subjects.of(family, "*", "*"), on_message)
    await client.connection.subscribe_sync(client.subjects.intake("*", "*", "*"), on_message)
    await client.requests.flush()
    monkeypatch.setenv("LOOM_SUBMITTER", "ann")
    plan = [{"id": "a", "description": "delegate"}, {"id": "b", "description": "count", "dependencies": ["a"]}]
    async with Runtime() as rt:
        rt.add_agent(part_or_whole, name="coder", capabilities={"code": 0.9})
        task = {"domain": "code", "description": "all", "context": {"plan": plan}, "labels": {"tenant": "acme"}}
        await rt.submit(task)
    await until(lambda: len(results) == 4, what="the task, two subtasks and a delegated one")
    assert submitters == {"ann"}
    for task_id, result in results.items():
        assert (result.state, result.labels) == ("succeeded", {"tenant": "acme"})
        assert (await record_of(client, task_id)).envelope.submitter == "ann"
        assert (await client_status(client, "ann", task_id))["state"] == "succeeded"
        assert (await client_status(client, "bob", task_id))["code"] == "unknown_task"


async def client_status(bus: Bus, submitter: str, task_id: str) -> dict[str, str]:
    """Return the answer to a request for the status by name."""
    answer: dict[str, str] = json.loads(
        (await bus.requests.request(bus.subjects.of("status", submitter, task_id))).data
    )
    return answer


# -- clients without nodes


async def test_a_session_without_nodes_hosts_none_until_it_has_one(
    on_bus: tuple[str, str], phases: Bus, client: Bus
) -> None:
    announced: list[object] = []
    await client.connection.subscribe_sync(client.subjects.of("host", "*", "*"), announced.append)
    async with Runtime() as rt:
        await client.requests.flush()
        assert not announced
        rt.add_agent(echo, name="coder", capabilities={"code": 0.9})
        await until(lambda: bool(announced), what="the node is announced without a call")
        assert await rt.submit({"domain": "code", "description": "sort"}) == "done: sort"


async def test_a_submit_right_after_the_first_node_reaches_it(on_bus: tuple[str, str], phases: Bus) -> None:
    async with Runtime() as rt:
        rt.add_agent(echo, name="coder", capabilities={"code": 0.9})
        assert await rt.submit({"node_id": "coder", "description": "sort"}) == "done: sort"


async def test_nodes_that_cannot_be_hosted_are_tried_again(
    on_bus: tuple[str, str], phases: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loom.runner.session.HOST_AGAIN_S", 0.01)
    nodes = [node("coder", echo, code=0.9)]
    there: list[object] = []
    real, failed = Session._open_host, []

    async def fail_once(self: Session) -> None:
        if not failed:
            failed.append(1)
            raise TimeoutError("the server did not echo")
        await real(self)

    monkeypatch.setattr(Session, "_open_host", fail_once)
    session = Session(lambda: nodes if there else [], from_environment())
    await session.open()
    there.append(1)
    await until(lambda: session.hosts_nodes, what="the nodes are hosted at the second try")
    await session.aclose()


async def test_a_conversation_without_own_nodes_does_not_wait_for_learning(
    on_bus: tuple[str, str], provider: OpenAIProvider
) -> None:
    url, namespace = on_bus
    without_adapt = [phase for phase in PHASES if phase != "adapt"]
    lifecycle = LifecycleManager(ClusterConfig(learn_wait_s=30))
    loop = AmoebaLoop(ClusterManager(), RewardBus(), lifecycle, TaskPlanner(provider), SkillNodeRegistry())
    async with (
        running_phases(url, names=without_adapt, namespace=namespace),
        running_nodes(url, lambda: [node("coder", echo, code=0.9)], namespace=namespace),
    ):
        began = time.monotonic()
        context = LoopContext(messages=[UserMessage("sort")], domain="code")
        events = [event async for event in loop.execute(context)]
    assert isinstance(events[-1], Done)
    assert events[-1].content == "done: sort"
    assert time.monotonic() - began < 20
