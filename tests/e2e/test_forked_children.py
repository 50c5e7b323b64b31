"""A process that forks while it uses a Runtime: parent and child continue without each other's sockets."""

import asyncio
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
from support.nodes import node

from loom import (
    AmoebaLoop,
    ClusterManager,
    LifecycleManager,
    LoopContext,
    RewardBus,
    Runtime,
    SkillNodeRegistry,
    TaskAd,
    UserMessage,
)
from loom.bus.bus import Bus
from loom.compat.planner import TaskPlanner

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

FORK = multiprocessing.get_context("fork")


async def where(description: str) -> str:
    return f"{description} in {os.getpid()}"


def runtime() -> Runtime:
    rt = Runtime()
    rt.add_agent(where, name="where")
    return rt


def pinned(description: str, node_id: str = "where") -> TaskAd:
    return TaskAd(description=description, node_id=node_id, timeout_s=15)


async def in_child(work: Callable[[], Awaitable[Any]]) -> str:
    """Return what `work` returns, or the error it raises, in a child that is forked by the event loop's thread."""
    receiver, sender = FORK.Pipe(duplex=False)

    def child() -> None:
        try:
            sender.send(asyncio.run(as_coroutine(work)))
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            sender.send(f"{type(error).__name__}: {error}")

    process = FORK.Process(target=child)
    process.start()
    await asyncio.to_thread(process.join, 20)
    assert process.exitcode == 0
    return str(receiver.recv())


async def as_coroutine(work: Callable[[], Awaitable[Any]]) -> Any:
    return await work()


shared: list[Runtime] = []
"""What the workers of a pool inherit."""


def in_worker(description: str) -> str:
    return shared[-1].submit_sync(pinned(description))


async def works_on(rt: Runtime) -> None:
    """The parent's tasks are done by the parent, and at once."""
    began = time.monotonic()
    for n in range(5):
        assert await asyncio.wait_for(rt.submit(pinned(f"{n}")), 10) == f"{n} in {os.getpid()}"
    assert time.monotonic() - began < 3


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_child_submits_to_the_parents_embedded_cluster(monkeypatch: pytest.MonkeyPatch, loop: str) -> None:
    monkeypatch.delenv("NATS_URL", raising=False)

    async def parent() -> None:
        async with runtime() as rt:
            await works_on(rt)
            assert await in_child(lambda: rt.submit(pinned("child"))) == f"child in {os.getpid()}"
            await works_on(rt)

    factory = pytest.importorskip(loop).new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(parent())


async def test_a_child_of_a_client_of_a_shared_server_has_a_connection_of_its_own(
    on_bus: tuple[str, str], phases: Bus
) -> None:
    async with runtime() as rt:
        await works_on(rt)
        children = await asyncio.gather(*(in_child(lambda: rt.submit(pinned("child"))) for _ in range(3)))
        assert children == [f"child in {os.getpid()}"] * 3
        await works_on(rt)


async def test_a_child_hosts_the_nodes_that_are_added_in_it(on_bus: tuple[str, str], phases: Bus) -> None:
    rt = runtime()

    async def child() -> str:
        rt.add_agent(where, name="new")
        async with rt:
            return f"{await rt.submit(pinned('task', 'new'))}, child {os.getpid()}"

    async with rt:
        await works_on(rt)
        done, _, pid = (await in_child(child)).rpartition(", child ")
        assert done == f"task in {pid}"
        assert pid != str(os.getpid())
        await works_on(rt)


@pytest.mark.slow
async def test_handles_connections_and_rewards_of_the_parent_are_refused_in_a_child(
    on_bus: tuple[str, str], phases: Bus
) -> None:
    url, namespace = on_bus

    async def reopened(bus: Bus) -> str:
        async with bus:
            await bus.requests.flush()
            return "works"

    go_on = asyncio.Event()

    async def held_back(description: str) -> str:
        await go_on.wait()
        return description

    rt = runtime()
    rt.add_agent(held_back, name="held_back")
    async with rt, Bus(url, namespace=namespace) as bus:
        handle = await rt.publish(pinned("task", "held_back"))
        for call in (handle.result, handle.content, lambda: anext(handle.events())):
            assert (await in_child(call)).startswith(
                "WrongEventLoop: this task handle was opened by the parent process"
            )
        for call in (handle.status, handle.cancel, bus.requests.flush, lambda: anext(rt.reward_bus.replay())):
            assert (await in_child(call)).startswith("BusUnavailable: the connection is not open in this process")
        assert await in_child(handle.close) == "None"
        assert await in_child(lambda: reopened(bus)) == "works"
        await bus.requests.flush()
        go_on.set()
        assert await handle.content() == "task"
        assert await in_child(handle.content) == "task"
        await works_on(rt)


@pytest.mark.slow
async def test_an_open_amoeba_loop_works_in_parent_and_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NATS_URL", raising=False)
    cluster = ClusterManager()
    cluster.add_node(node("where", where, code=0.9))
    loop = AmoebaLoop(cluster, RewardBus(), LifecycleManager(), TaskPlanner(None), SkillNodeRegistry())  # type: ignore[arg-type]

    async def last() -> str:
        events = [e async for e in loop.execute(LoopContext(messages=[UserMessage("task")], domain="code"))]
        return str(events[-1].content)  # type: ignore[union-attr]

    async with loop:
        assert await last() == f"task in {os.getpid()}"
        assert await in_child(last) == f"task in {os.getpid()}"
        assert await last() == f"task in {os.getpid()}"


@pytest.mark.slow
async def test_agents_may_fork_pools_and_children_that_exit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NATS_URL", raising=False)
    rt = runtime()
    shared.append(rt)

    def pooled(description: str) -> str:
        with ProcessPoolExecutor(2, mp_context=FORK) as pool:
            return ", ".join(pool.map(in_worker, ["one", "two"]))

    def forks(description: str) -> str:
        child = os.fork()
        if child == 0:
            rt.dispose()
            os._exit(0)
        return f"status {os.waitpid(child, 0)[1]}"

    rt.add_agent(pooled, name="pooled")
    rt.add_agent(forks, name="forks")
    async with rt:
        for _ in range(2):
            assert await rt.submit(pinned("x", "pooled")) == f"one in {os.getpid()}, two in {os.getpid()}"
            assert await rt.submit(pinned("x", "forks")) == "status 0"
        await works_on(rt)


def script(text: str, *arguments: str) -> str:
    """Run a program of its own and return its standard output."""
    environment = {name: value for name, value in os.environ.items() if name != "NATS_URL"}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(text), *arguments],
        capture_output=True, text=True, timeout=50, check=False, env=environment,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


PROGRAM = """
    import gc, os
    from loom import Runtime, TaskAd

    def where(description: str) -> str:
        return f"{description} in {os.getpid() == parent}"

    parent = os.getpid()
    rt = Runtime()
    rt.add_agent(where, name="where")
    print(rt.submit_sync(TaskAd(description="before")), flush=True)
"""


@pytest.mark.slow
def test_a_child_that_exits_normally_leaves_the_parents_server_and_sockets_open() -> None:
    assert (
        script(
            PROGRAM
            + """
    if (child := os.fork()) == 0:
        print(rt.submit_sync(TaskAd(description="child")), flush=True)
        gc.collect()
    else:
        assert os.waitpid(child, 0)[1] == 0
        for _ in range(3):
            print(rt.submit_sync(TaskAd(description="after"), timeout_s=10), flush=True)
    """
        )
        == "before in True\nchild in True\n" + 3 * "after in True\n"
    )


@pytest.mark.slow
def test_a_child_whose_parent_has_closed_its_runtime_starts_a_server_of_its_own() -> None:
    assert (
        script(
            PROGRAM
            + """
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.read(reading, 1)
        print(rt.submit_sync(TaskAd(description="child")), flush=True)
        rt.dispose()
    else:
        rt.dispose()
        os.write(writing, b"x")
        assert os.waitpid(child, 0)[1] == 0
    """
        )
        == "before in True\nchild in False\n"
    )


FORKS_IN_ITS_LOOP = """
    import asyncio, os, sys
    from loom import Runtime, TaskAd

    children = []

    async def echo(description: str) -> str:
        return description

    async def forks(description: str) -> str:
        child = os.fork()
        if child == 0 and description == "exits":
            sys.exit(0)
        if child == 0 and description == "raises":
            raise ValueError("in the child")
        children.append(child)
        return "forked"

    rt = Runtime()
    rt.add_agent(echo, name="echo")
    rt.add_agent(forks, name="forks")

    async def main() -> None:
        async with rt:
            if sys.argv[1] == "program":
                children.append(os.fork())
                if not children[0]:
                    sys.exit(0)
            else:
                print(await rt.submit(TaskAd(description=sys.argv[1], node_id="forks")), flush=True)
            for child in children:
                await asyncio.wait_for(asyncio.to_thread(os.waitpid, child, 0), 20)
            for n in range(3):
                print(await asyncio.wait_for(rt.submit(TaskAd(description="after", node_id="echo")), 10), flush=True)

    asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("child", "first"),
    [
        ("exits", "forked\n"),
        pytest.param("raises", "forked\n", marks=pytest.mark.slow),
        pytest.param("returns", "forked\n", marks=pytest.mark.slow),
        pytest.param("program", "", marks=pytest.mark.slow),
    ],
)
def test_a_child_forked_in_the_loops_own_thread_ends_and_takes_nothing_from_the_parent(child: str, first: str) -> None:
    assert script(FORKS_IN_ITS_LOOP, child) == first + 3 * "after\n"
