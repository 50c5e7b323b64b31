"""Records and learned profiles in a store outlive a program."""

import asyncio
import gc
import os
import re
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from support.command import command
from support.logs import capture_logs
from support.nodes import echo, node
from support.stored import TASKS, ads, everything_is_there
from support.wait import until

from loom import (
    AmoebaLoop,
    ClusterManager,
    LifecycleManager,
    LoomError,
    LoopContext,
    RewardBus,
    Runtime,
    SkillNodeRegistry,
    TaskAd,
    UserMessage,
)
from loom.bus.bus import Bus
from loom.bus.queries import recent_records
from loom.compat.planner import TaskPlanner
from loom.runner.server.nats_server import NatsServer
from loom.schemas.errors import BusUnavailable
from loom.types import CapabilityProfile


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server in the environment: all start their own."""
    monkeypatch.delenv("NATS_URL", raising=False)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def entries(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def runtime(store: Path | None = None) -> Runtime:
    rt = Runtime(store=store)
    rt.add_agent(echo, name="coder", capabilities=CapabilityProfile(scores={"code": 0.6}))
    return rt


def amoeba(store: Path | None = None) -> AmoebaLoop:
    cluster = ClusterManager()
    cluster.add_node(node("coder", echo, code=0.6))
    return AmoebaLoop(
        cluster,
        RewardBus(),
        LifecycleManager(),
        TaskPlanner(None),  # type: ignore[arg-type]  # not asked
        SkillNodeRegistry(),
        store=store,
    )


async def converse(loop: AmoebaLoop) -> str:
    ask = LoopContext(messages=[UserMessage("sort")], domain="code")
    return [event async for event in loop.execute(ask)][-1].content  # type: ignore[union-attr]  # Done comes last


ABANDONED = """
import asyncio
from loom import AmoebaLoop, ClusterManager, LifecycleManager, LoopContext, RewardBus, SkillNodeRegistry, UserMessage
from loom.compat.planner import TaskPlanner
from loom.types import AgentNode, CapabilityProfile

cluster = ClusterManager()
cluster.add_node(AgentNode(id="coder", agent=lambda text: "done", capabilities=CapabilityProfile(scores={"code": 0.6})))
loop = AmoebaLoop(cluster, RewardBus(), LifecycleManager(), TaskPlanner(None), SkillNodeRegistry())

async def begin():
    async for _ in loop.execute(LoopContext(messages=[UserMessage("sort")], domain="code")):
        break

asyncio.run(begin())
"""


# -- Runtime


@pytest.mark.slow
async def test_a_runtime_on_a_store_loads_its_records_and_profiles(tmp_path: Path) -> None:
    async with runtime(tmp_path / "store") as rt:
        assert all(result.state == "succeeded" for result in await rt.submit_many(ads(5)))
        coder = rt.cluster.nodes[0]
        await until(lambda: coder.capabilities.total_tasks == 5, what="all is learned")

    again = runtime(tmp_path / "store")
    async with again:
        session = await again._open()
        records = await recent_records(session.bus, limit=100)
        assert {each.task_id for each in records} == {ad.task_id for ad in ads(5)}
        facts = again.cluster.nodes[0].capabilities
        assert (facts.total_tasks, facts.success_rate) == (5, 1.0)
        assert facts.scores["code"] > 0.6
        assert again.cluster.nodes[0].claim("code") == 0.6


async def test_a_second_runtime_on_a_store_is_refused_with_the_address_of_the_first(tmp_path: Path) -> None:
    async with runtime(tmp_path):
        with pytest.raises(BusUnavailable, match=rf"in use by the server of process {os.getpid()} at nats://127.0.0.1"):
            await runtime(tmp_path).submit(ads(1)[0])


@pytest.mark.slow
async def test_a_runtime_without_a_store_keeps_nothing_and_loom_store_sets_the_place(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with runtime():
        pass
    assert not entries(temporary)

    monkeypatch.setenv("LOOM_STORE", str(tmp_path / "kept"))
    async with runtime():
        pass
    assert (tmp_path / "kept" / "jetstream").is_dir()


async def test_a_store_given_with_a_running_server_is_reported_as_unused(
    on_bus: tuple[str, str], phases: Bus, tmp_path: Path
) -> None:
    with capture_logs() as logs:
        async with runtime(tmp_path / "store"):
            pass
    [line] = [line for line in logs if line["event"] == "store_not_used"]
    assert (line["log_level"], line["folder"]) == ("warning", str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_a_store_with_a_stream_that_cannot_be_read_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with runtime(tmp_path):
        pass
    meta = next(path for path in tmp_path.rglob("meta.inf") if path.parent.name == "LOOM_REWARDS")
    meta.write_bytes(b"garbage")

    with pytest.raises(BusUnavailable, match=rf"cannot read all of {tmp_path} \(.*restore the folder from a backup"):
        NatsServer(tmp_path).start()
    assert meta.read_bytes() == b"garbage"


PROGRAM = """
import sys, time
from loom import Runtime, TaskAd
from loom.types import CapabilityProfile

rt = Runtime(store=sys.argv[1])
coder = rt.add_agent(lambda text: "done", name="coder", capabilities=CapabilityProfile(scores={"code": 0.6}))
with rt:
    for number in range(30):
        rt.submit_sync(TaskAd(task_id=f"t{number}", domain="code", description="sort"))
    while coder.capabilities.total_tasks < 30:
        time.sleep(0.01)
    print("all done", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
async def test_a_program_killed_with_its_group_leaves_its_records_in_its_store(tmp_path: Path) -> None:
    store = tmp_path / "store"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, str(store), stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"all done\n"
    os.killpg(process.pid, signal.SIGKILL)
    await process.wait()

    again = runtime(store)
    async with again:  # at once, while the guard may still be ending the first server
        assert again.cluster.nodes[0].capabilities.total_tasks == TASKS
        await everything_is_there((await again._open()).bus)


# -- with, closing


def test_synchronous_code_opens_a_runtime_with_a_block_and_closes_it_quickly() -> None:
    began = time.monotonic()
    with runtime() as rt:
        assert rt.submit_sync(ads(1)[0]) == "done: sort"
    assert time.monotonic() - began < 2
    with pytest.raises(LoomError, match="closed; open it again with"):
        rt.submit_sync(ads(1)[0])
    with rt:
        assert rt.submit_sync(ads(1)[0]) == "done: sort"


@pytest.mark.slow
def test_leaving_a_block_finishes_running_tasks() -> None:
    ended: list[str] = []

    async def slow(description: str) -> str:
        await asyncio.sleep(0.2)
        ended.append(description)
        return description

    rt = runtime()
    rt.add_agent(slow, name="slow")
    with rt, pytest.raises(TimeoutError):
        rt.submit_sync(TaskAd(description="x", node_id="slow"), timeout_s=0.1)
    assert ended == ["x"]


async def test_a_synchronous_block_is_refused_in_an_event_loop() -> None:
    with pytest.raises(LoomError, match="use `async with`"), runtime():
        pass


def test_a_block_that_cannot_be_opened_leaves_no_thread(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    threads = threading.active_count()
    with pytest.raises(BusUnavailable, match="Not a directory"), runtime(tmp_path / "file" / "store"):
        pass
    assert threading.active_count() == threads


@pytest.mark.slow
def test_an_event_loop_that_ends_with_a_runtime_open_does_not_wait_for_it() -> None:
    rt = runtime()
    began = time.monotonic()
    for ad in ads(2):
        assert asyncio.run(rt.submit(ad)) == "done: sort"
    assert time.monotonic() - began < 2  # two openings included; a wait for a lost answer takes 2 s each
    rt.dispose()


async def test_a_closed_runtime_refuses_calls_until_it_is_opened_again(on_bus: tuple[str, str], phases: Bus) -> None:
    rt = runtime()
    assert await rt.submit(ads(1)[0]) == "done: sort"
    rt.dispose()
    for call in (rt.submit(ads(1)[0]), rt.publish(ads(1)[0]), rt.submit_many(ads(1)), rt.feedback("t", 1.0)):
        with pytest.raises(LoomError, match="the Runtime is closed; open it again with `async with`"):
            await call
    async with rt:
        assert await rt.submit(TaskAd(domain="code", description="sort")) == "done: sort"
    with pytest.raises(LoomError, match="the Runtime is closed"):
        await rt.submit(ads(1)[0])


async def test_a_task_pinned_to_a_node_just_added_starts_at_once(on_bus: tuple[str, str], phases: Bus) -> None:
    async with runtime() as rt:
        for number in range(3):
            rt.add_agent(echo, name=f"new-{number}")
            began = time.monotonic()
            assert await rt.submit(TaskAd(description="sort", node_id=f"new-{number}")) == "done: sort"
            assert time.monotonic() - began < 1  # an unannounced one waits 2 s


async def test_runtimes_handles_and_records_show_their_identity_and_state(
    on_bus: tuple[str, str], phases: Bus, tmp_path: Path
) -> None:
    assert repr(Runtime(store=tmp_path)).startswith("<Runtime not open, nats://")
    async with runtime() as rt:
        assert re.fullmatch(r"<Runtime open, nats://127.0.0.1:\d+, 1 nodes>", repr(rt))
        handle = await rt.publish(TaskAd(task_id="mine", domain="code", description="sort"))
        assert repr(handle) == "<TaskHandle mine, not known to have ended>"
        await handle.result()
        assert repr(handle) == "<TaskHandle mine, succeeded>"
        assert repr(await handle.record()) == "<TaskRecord mine, succeeded>"
    assert repr(rt).startswith("<Runtime closed, ")


# -- AmoebaLoop


@pytest.mark.slow
async def test_a_loop_continues_with_the_profiles_of_earlier_conversations(temporary: Path) -> None:
    loop = amoeba()
    coder = loop.cluster.nodes[0]
    scores = [coder.capabilities.scores["code"]]
    for _ in range(3):
        assert await converse(loop) == "done: sort"
        scores.append(coder.capabilities.scores["code"])

    assert scores == sorted(set(scores))
    assert (coder.capabilities.total_tasks, coder.capabilities.success_rate) == (3, 1.0)
    assert (coder.self_ratings, coder.claim("code")) == ({"code": 0.6}, 0.6)
    loop.dispose()
    assert not entries(temporary)


async def test_conversations_at_once_share_the_loops_store(temporary: Path) -> None:
    loop = amoeba()
    assert await asyncio.gather(*(converse(loop) for _ in range(4))) == ["done: sort"] * 4
    assert loop.cluster.nodes[0].capabilities.total_tasks == 4


async def test_a_loop_that_is_dropped_removes_its_temporary_store(temporary: Path) -> None:
    loop = amoeba()
    await converse(loop)
    assert entries(temporary)
    del loop
    gc.collect()
    assert not entries(temporary)


@pytest.mark.slow
def test_an_event_loop_that_ends_within_a_conversation_does_not_wait_for_it() -> None:
    loop = amoeba()

    async def begin() -> None:
        async for _ in loop.execute(LoopContext(messages=[UserMessage("sort")], domain="code")):
            break

    began = time.monotonic()
    for _ in range(2):
        asyncio.run(begin())
    assert time.monotonic() - began < 5  # two openings included; a wait for a lost answer takes 3 s each
    loop.dispose()


@pytest.mark.slow
async def test_a_program_that_ends_within_a_conversation_leaves_no_temporary_store(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    async with command(tmp_path, sys.executable, "-c", ABANDONED, TMPDIR=str(tmp_path / "temporary")) as running:
        assert (await running.end()).code == 0
    await until(lambda: not entries(tmp_path / "temporary"), what="nothing is left")


@pytest.mark.slow
async def test_a_loop_with_a_store_is_continued_by_the_next_one(tmp_path: Path) -> None:
    await converse(amoeba(tmp_path))
    second = amoeba(tmp_path)
    await converse(second)

    assert second.cluster.nodes[0].capabilities.total_tasks == 2
