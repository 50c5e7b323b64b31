"""What it costs to lose less: a server that flushes every write to the disk, and three servers with a copy each."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from support.nats_cluster import NatsCluster

from bench.bench_cluster import BenchCluster
from bench.measure import load
from loom.runner.server.nats_server import NatsServer

WARM_UP, TASKS, QUICK_TASKS, AT_ONCE, ALONE = 64, 1000, 200, 256, 50


@asynccontextmanager
async def one(sync_interval: str | None = None) -> AsyncIterator[tuple[str, int]]:
    """Run one server; without an interval it flushes to the disk every two minutes, as `loom up` has it."""
    server = NatsServer(sync_interval=sync_interval)
    server.start()
    try:
        yield server.url, server.pid
    finally:
        server.stop()


@asynccontextmanager
async def three() -> AsyncIterator[tuple[str, int]]:
    """Run three servers on this machine, each with a copy of every stream; the CPU counted is the first one's."""
    cluster = NatsCluster()
    await cluster.start()
    try:
        yield cluster.url, next(iter(cluster.members.values()))._pid
    finally:
        cluster.stop()


async def durability(*, quick: bool) -> None:
    """Throughput and time of a task on one server, on one that flushes every write, on three with three copies."""
    for label, serving, copies in (
        ("one server", one(), 1),
        ("one, flushing", one("always"), 1),
        ("three", three(), 3),
    ):
        async with serving as (url, pid), AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            running = BenchCluster(url, pid, folder, stack, LOOM_REPLICAS=str(copies))
            await running.phases()
            await running.hosts()
            await running.connect()
            await running.carry(WARM_UP, WARM_UP)
            alone = await load(running, ALONE, 1)
            many = await load(running, QUICK_TASKS if quick else TASKS, AT_ONCE)
            print(
                f"{label:14} {many.per_s:6,.0f} tasks/s with {AT_ONCE} under way; p50 alone {alone.p50_ms:6.2f} ms;"
                f" server {many.cpu_us['server']:,.0f} µs a task"
            )
