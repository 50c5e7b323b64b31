"""The Runtime: the Python interface to submit tasks and host agents."""

import asyncio
from collections.abc import AsyncIterator
from contextvars import ContextVar
from pathlib import Path

import pytest
import structlog
from support.nodes import Counting, echo, fail
from support.wait import until

from loom import Runtime, TaskAd
from loom.bus import task_client
from loom.bus.bus import Bus
from loom.schemas.errors import AgentFailed, BusUnavailable, Cancelled, InvalidTask, LoomError, NoBids, UnknownTask
from loom.schemas.events import TextDelta
from loom.schemas.llm import CompletionParams, CompletionResult, StreamChunk
from loom.schemas.record import TaskRecord
from loom.schemas.run import RunRequest
from loom.types import CapabilityProfile, ClusterConfig

CODE = CapabilityProfile(scores={"code": 0.9})


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server in the environment: a Runtime starts its own."""
    monkeypatch.delenv("NATS_URL", raising=False)


def runtime(**rules: object) -> Runtime:
    rt = Runtime(cluster_config=ClusterConfig(**rules))  # type: ignore[arg-type]
    rt.add_agent(echo, name="coder", capabilities=CapabilityProfile(scores={"code": 0.9}))
    return rt


async def test_building_a_runtime_does_no_io(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_URL", "nats://127.0.0.1:1")
    rt = runtime()
    assert [report.status for report in rt.health_check()] == ["healthy"]
    rt.dispose()


@pytest.mark.slow
async def test_a_missing_server_is_bus_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_URL", "nats://127.0.0.1:1")
    with pytest.raises(BusUnavailable, match="no nats-server at"):
        await runtime().submit(TaskAd(domain="code", description="x"))


async def test_a_server_without_phases_is_bus_unavailable(on_bus: tuple[str, str]) -> None:
    with pytest.raises(BusUnavailable, match='no phases answer; run "loom up"'):
        await runtime().submit(TaskAd(domain="code", description="x"))


async def test_submit_returns_the_answer(on_bus: tuple[str, str], phases: Bus) -> None:
    async with runtime() as rt:
        assert await rt.submit(TaskAd(domain="code", description="sort")) == "done: sort"


@pytest.mark.parametrize("close", ["aclose", "dispose"])
async def test_a_closed_runtime_leaves_its_reward_bus_without_a_bus(
    on_bus: tuple[str, str], phases: Bus, close: str
) -> None:
    rt = runtime()
    await rt.submit(TaskAd(domain="code", description="sort"))
    assert rt.reward_bus.bus is not None

    await rt.aclose() if close == "aclose" else rt.dispose()

    assert rt.reward_bus.bus is None
    rt.dispose()


async def test_a_failure_is_raised_as_its_type(on_bus: tuple[str, str], phases: Bus) -> None:
    rt = Runtime()
    rt.add_agent(fail, name="clumsy", capabilities=CODE)
    async with rt:
        with pytest.raises(AgentFailed, match="RuntimeError") as caught:
            await rt.submit(TaskAd(domain="code", description="sort"))

        assert caught.value.node_id == "clumsy"
        assert caught.value.task_id


async def test_bad_ads_are_refused_before_anything_is_sent(on_bus: tuple[str, str], phases: Bus) -> None:
    async with runtime() as rt:
        for ad in (
            TaskAd(description=""),
            TaskAd(description="x", task_id="a.b"),
            TaskAd(description="x", context={"when": object()}),
            TaskAd(description="lone \ud800 surrogate"),
        ):
            with pytest.raises(InvalidTask):
                await rt.submit(ad)


async def test_a_handle_streams_events_and_returns_status_and_result(on_bus: tuple[str, str], phases: Bus) -> None:
    async with runtime() as rt:
        handle = await rt.publish(TaskAd(domain="code", description="sort"))
        texts = [delta.event.text async for delta in handle.events() if isinstance(delta.event, TextDelta)]
        result = await handle.result()
        status, record = await handle.status(), await handle.record()

    assert "".join(texts) == result.content == "done: sort"
    assert isinstance(record, TaskRecord)
    assert status == result == record.to_result()


async def test_cancelling_stops_the_agent_within_a_second(on_bus: tuple[str, str], phases: Bus) -> None:
    started, stopped = asyncio.Event(), asyncio.Event()

    async def endless(description: str) -> str:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return description

    rt = Runtime()
    rt.add_agent(endless, name="endless", capabilities=CODE)
    async with rt:
        handle = await rt.publish(TaskAd(domain="code", description="wait"))
        async with asyncio.timeout(5):
            await started.wait()
        cancelled = await handle.cancel()
        async with asyncio.timeout(1):
            await stopped.wait()
        record = await handle.record()
        with pytest.raises(Cancelled):
            await handle.content(5)

    assert cancelled.state == "cancelled"
    assert record is not None
    assert record.to_result() == cancelled
    assert record.envelope.award is not None  # its story so far is kept
    assert [hop.phase for hop in record.envelope.hops][:2] == ["sense", "match"]  # EXECUTE may report it first


async def test_an_unknown_task_is_reported_as_unknown(on_bus: tuple[str, str], phases: Bus) -> None:
    async with runtime() as rt:
        with pytest.raises(UnknownTask):
            await rt.feedback("unknown-task", 1.0)


async def test_submit_many_keeps_order_and_bounds_the_tasks_in_flight(on_bus: tuple[str, str], phases: Bus) -> None:
    agent = Counting(0.02)
    rt = Runtime()
    rt.add_agent(agent, name="coder", capabilities=CODE)
    async with rt:
        ads = [TaskAd(domain="code", description=str(number)) for number in range(30)]
        results = await rt.submit_many(ads, at_once=5)

    assert [result.content for result in results] == [f"done: {number}" for number in range(30)]


async def test_feedback_outweighs_the_rules_on_one_and_the_same_task(on_bus: tuple[str, str], phases: Bus) -> None:
    async with runtime() as rt:
        handle = await rt.publish(TaskAd(domain="code", description="sort"))
        await handle.result()
        await rt.feedback(handle.task_id, 0.0, reason="not what I asked for")

        [coder] = rt.cluster.nodes
        await until(lambda: [one.reward for one in coder.reward_history] == [0.25], what="both judgements are learned")
        assert coder.capabilities.total_tasks == 1
        [report] = rt.health_check()
        assert report.recent_avg_reward == 0.25
        with pytest.raises(InvalidTask, match="from 0 to 1"):
            await rt.feedback(handle.task_id, 1.5)


async def test_unused_nodes_stay_healthy(on_bus: tuple[str, str], phases: Bus) -> None:
    async with runtime() as rt:
        for name in "abcd":
            rt.add_agent(echo, name=name)
        await rt.submit(TaskAd(domain="code", description="sort"))

        assert len(rt.cluster.nodes) == 5
        assert {report.status for report in rt.health_check()} == {"healthy"}


async def test_nodes_added_while_it_runs_bid_at_once(on_bus: tuple[str, str], phases: Bus) -> None:
    rt = Runtime()
    async with rt:
        rt.add_agent(echo, name="late", capabilities=CODE)
        assert await rt.submit(TaskAd(domain="code", description="sort")) == "done: sort"


@pytest.mark.slow
async def test_a_task_without_bidders_ends_as_no_bids(embedded: None) -> None:
    async with Runtime(cluster_config=ClusterConfig(no_bids_after_s=0.5)) as rt:
        with pytest.raises(NoBids, match="loom host run"):
            await rt.submit(TaskAd(domain="code", description="sort"))


async def test_cluster_config_rules_the_phases_started_here(embedded: None) -> None:
    agent = Counting()

    async def refuse(job: object) -> str:
        raise LoomError("never")

    rt = Runtime(cluster_config=ClusterConfig(max_attempts=1))
    rt.add_agent(refuse, name="sure", capabilities=CapabilityProfile(scores={"code": 1.0}))
    rt.add_agent(agent, name="spare", capabilities=CapabilityProfile(scores={"code": 0.1}))
    async with rt:
        with pytest.raises(AgentFailed):
            await rt.submit(TaskAd(domain="code", description="sort"))

    assert not agent.runs


async def test_dispose_leaves_neither_process_nor_folder_and_may_be_called_twice(
    embedded: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def folders() -> list[Path]:
        return list(tmp_path.iterdir())

    rt = runtime()
    assert await rt.submit(TaskAd(domain="code", description="sort")) == "done: sort"
    assert folders()
    rt.dispose()
    rt.dispose()

    await until(lambda: not folders(), what="the server's folder is gone")


@pytest.mark.slow
def test_a_runtime_serves_one_event_loop_after_another(embedded: None) -> None:
    rt = runtime()
    answers = [asyncio.run(rt.submit(TaskAd(domain="code", description=text))) for text in ("one", "two")]
    rt.dispose()

    assert answers == ["done: one", "done: two"]


async def test_default_names_depend_on_the_agent_and_its_domains() -> None:
    first, second = Runtime(), Runtime()
    names = [
        [
            rt.add_agent(echo, capabilities=CapabilityProfile(scores={domain: 0.5})).id
            for domain in ("code", "code", "data")
        ]
        for rt in (first, second)
    ]

    assert names[0] == names[1]
    assert len(set(names[0])) == 3
    assert names[0][0].rpartition("-")[0] == names[0][1].rpartition("-")[0] != names[0][2].rpartition("-")[0]


async def test_nodes_may_be_given_one_profile_and_keep_their_own_tools() -> None:
    class Equipped(Counting):
        def __init__(self, tool: str) -> None:
            super().__init__()
            self.tools = [tool]

    rt, given = Runtime(), CapabilityProfile(scores={"code": 0.9})
    nodes = [rt.add_agent(Equipped(tool), name=tool, capabilities=given) for tool in ("left", "right")]

    assert [node.capabilities.tools for node in nodes] == [["left"], ["right"]]
    assert given.tools == []


@pytest.mark.parametrize("thing", [3, Counting, divmod])
async def test_an_object_that_is_not_an_agent_is_refused_when_added(thing: object) -> None:
    rt = Runtime()
    with pytest.raises(LoomError):
        rt.add_agent(thing)
    assert not rt.cluster.nodes


async def test_a_failing_program_does_not_wait_for_running_tasks(embedded: None) -> None:
    begun = asyncio.Event()

    async def endless(description: str) -> str:
        begun.set()
        await asyncio.sleep(600)
        return description

    rt = Runtime(cluster_config=ClusterConfig(drain_timeout_s=30.0))
    rt.add_agent(endless, name="endless")

    async def program() -> None:
        async with rt:
            await rt.publish(TaskAd(description="x"))
            await begun.wait()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(program(), 15)


tenant: ContextVar[str] = ContextVar("tenant", default="unset")


async def test_a_run_does_not_inherit_the_context_of_the_opening_caller(on_bus: tuple[str, str], phases: Bus) -> None:
    async def waits(description: str) -> str:
        return tenant.get()

    def threaded(description: str) -> str:
        return tenant.get()

    rt = Runtime()
    rt.add_agent(waits, name="waits")
    rt.add_agent(threaded, name="threaded")

    async def request(caller: str, node_id: str) -> str:
        tenant.set(caller)
        structlog.contextvars.bind_contextvars(caller=caller)
        return await rt.submit(TaskAd(domain="code", description="x", node_id=node_id))

    for caller in ("alice", "bob"):
        for node_id in ("waits", "threaded"):
            assert await asyncio.create_task(request(caller, node_id)) == "unset"
    await rt.aclose()


class Interrupts:
    """A model provider that raises KeyboardInterrupt or SystemExit in its caller."""

    async def complete(self, params: CompletionParams) -> CompletionResult:
        raise KeyboardInterrupt(params.max_tokens)

    async def stream(self, params: CompletionParams) -> AsyncIterator[StreamChunk]:
        yield StreamChunk(text=str(params.max_tokens))
        raise SystemExit


async def test_a_provider_that_interrupts_the_phases_ends_neither_them_nor_the_program(embedded: None) -> None:
    rt = Runtime(Interrupts(), cluster_config=ClusterConfig(judge_share=1.0))
    rt.add_agent(echo, name="echo")
    async with rt:
        assert await rt.submit(TaskAd(description="hm")) == "done: hm"  # so vague that SENSE asks the model


async def test_a_task_is_cancelled_with_its_caller_on_request(
    on_bus: tuple[str, str], phases: Bus, client: Bus
) -> None:
    begun: list[str] = []
    stopped: list[str] = []

    async def endless(job: RunRequest) -> str:
        begun.append(job.task_id)
        try:
            await asyncio.sleep(600)
        finally:
            stopped.append(job.task_id)
        return ""

    async def state(ad: TaskAd) -> str:
        return (await task_client.status(client, ad.task_id)).state

    one, two, three, kept = (TaskAd(description="x", node_id="endless") for _ in range(4))
    rt = Runtime()
    rt.add_agent(endless, name="endless")
    async with rt:
        calls = [
            asyncio.ensure_future(rt.submit(one, cancel_with_caller=True)),
            asyncio.ensure_future(rt.submit_many([two, three], cancel_with_caller=True)),
            asyncio.ensure_future(rt.submit(kept)),
        ]
        await until(lambda: len(begun) == 4, what="all run")
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        await until(lambda: len(stopped) == 3, what="three are stopped")
        assert [await state(ad) for ad in (one, two, three, kept)] == [*["cancelled"] * 3, "running"]
        await task_client.cancel(client, kept.task_id)


async def test_submit_many_that_fails_submits_nothing_more(on_bus: tuple[str, str], phases: Bus) -> None:
    agent = Counting(0.05)
    rt = Runtime()
    rt.add_agent(agent, name="coder", capabilities=CODE)
    async with rt:
        good = [TaskAd(domain="code", description=str(n)) for n in range(20)]
        with pytest.raises(InvalidTask):
            await rt.submit_many([*good[:2], TaskAd(task_id="a.b", description="x"), *good[2:]], at_once=3)
        await rt.submit(TaskAd(domain="code", description="last"))
        assert len(agent.runs) <= 4
