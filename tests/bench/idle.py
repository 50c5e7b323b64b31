"""What the loop takes to start, to do nothing, and to have much before it."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median

from support.wait import until

from bench.bench_cluster import BenchCluster, ad, whole_loop
from bench.measure import cpu_s, rss_mb, verdict
from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.schemas.base import new_id
from loom.schemas.task import Submission

FIRST = Path(__file__).with_name("first_result.py")
STARTS = 5
MOST_START_MS, MOST_IDLE, MOST_IDLE_MB = 400.0, 0.03, 90.0
IDLE_S, QUICK_IDLE_S = 10.0, 4.0
SETTLE_S = 2.0
USUAL, WORTH = 1000, 0.8
"""Tasks under way to compare a backlog with, and the share of their throughput it must have."""
STORES = 128
"""Submissions stored at once."""
WINDOW_S, QUICK_WINDOW_S = 20.0, 5.0
QUICK_BACKLOG = 5000
HOURS = 4 * 3600.0
WITHIN_S = 120


async def start_up(*, quick: bool) -> None:
    """From `Runtime()` to the first result, in fresh processes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LOOM_", "NATS_", "OPENAI_"))}
    times = []
    for _ in range(2 if quick else STARTS + 1):
        finished = await asyncio.to_thread(
            subprocess.run, [sys.executable, str(FIRST)], capture_output=True, text=True, check=True, env=kept
        )
        times.append([float(word) for word in finished.stdout.split()])
    imports, firsts = zip(*times[1:], strict=True)  # the first one warms the binary
    took = median(firsts)
    print(
        f"Runtime() to first result: {took:.0f} ms ({min(firsts):.0f} to {max(firsts):.0f}), after an import of"
        f" {median(imports):.0f} ms  ({verdict(took <= MOST_START_MS)}: ≤ {MOST_START_MS:.0f} ms)"
    )


async def idle(*, quick: bool) -> None:
    """Six phases in one process, two hosts, no task."""
    seconds = QUICK_IDLE_S if quick else IDLE_S
    async with whole_loop() as running:
        await running.carry(20, 1)
        await asyncio.sleep(SETTLE_S)
        before = _cpu(running)
        await asyncio.sleep(seconds)
        for name, pid in running.processes.items():
            share, size = (cpu_s(pid) - before[name]) / seconds, rss_mb(pid)
            kept = verdict(share < MOST_IDLE and size < MOST_IDLE_MB)
            promised = f"  ({kept}: < {MOST_IDLE:.0%}, < {MOST_IDLE_MB:.0f} MB)" if name == "phases" else ""
            print(f"idle, {name:10} {share:6.1%} of a core, {size:4.0f} MB{promised}")


class Feed:
    """Stores submissions as a client does that waits for nothing, and counts results."""

    def __init__(self, bus: Bus) -> None:
        self.results = 0
        self._bus = bus
        self._on_result: Callable[[], None] = lambda: None

    async def listen(self) -> None:
        await self._bus.connection.subscribe(self._bus.subjects.of("result", "*", "*"), self._count)

    async def queue(self, tasks: int) -> None:
        """Store so many, some side by side."""
        left = iter(range(tasks))

        async def some() -> None:
            for _ in left:
                await self._store()

        await asyncio.gather(*(some() for _ in range(STORES)))

    async def keep(self, under_way: int, tasks: int) -> float:
        """Keep so many under way until as many are done, and return results a second."""
        room = asyncio.Semaphore(under_way)
        self._on_result = room.release
        started, already = time.perf_counter(), self.results

        async def some() -> None:
            while next(numbers) < tasks:
                await room.acquire()
                await self._store()

        numbers = count()
        await asyncio.gather(*(some() for _ in range(STORES)))
        await until(lambda: self.results >= already + tasks, within_s=WITHIN_S, what="all is done")
        self._on_result = lambda: None
        return tasks / (time.perf_counter() - started)

    async def _store(self) -> None:
        task = ad(timeout_s=HOURS)
        submission = Submission(ad=task, submission=new_id())
        await self._bus.jetstream.publish(
            self._bus.subjects.intake("public", task.priority, task.task_id),
            submission,
            msg_id=f"{task.task_id}:{submission.submission}",
        )

    async def _count(self, _msg: Msg) -> None:
        self.results += 1
        self._on_result()


async def backlog(*, quick: bool, queued: int) -> None:
    """Throughput and the phases' memory with a long queue, next to those with 1,000 under way."""
    queued = min(queued, QUICK_BACKLOG) if quick else queued
    window = QUICK_WINDOW_S if quick else WINDOW_S
    async with whole_loop() as running:
        feed = Feed(running.bus)
        await feed.listen()
        await feed.keep(USUAL, USUAL)
        tasks, cpu = USUAL * (2 if quick else 5), _cpu(running)
        usual = await feed.keep(USUAL, tasks)
        usual_cpu = _cpu_report(running, cpu, tasks)
        sizes = [rss_mb(running.processes["phases"])]
        before = feed.results
        await feed.queue(queued)
        left = queued - (feed.results - before)
        started, before, cpu = time.perf_counter(), feed.results, _cpu(running)
        sizes.append(rss_mb(running.processes["phases"]))
        while (took := time.perf_counter() - started) < window and feed.results - before < left:
            await asyncio.sleep(min(0.5, window - took))
            sizes.append(rss_mb(running.processes["phases"]))
        done = feed.results - before
        rate = done / (time.perf_counter() - started)
        print(f"{USUAL:7,} under way: {usual:6,.0f} tasks/s, phases {sizes[0]:.0f} MB; {usual_cpu}")
        print(
            f"{left:7,} queued:    {rate:6,.0f} tasks/s, {rate / usual:.2f} of that "
            f" ({verdict(rate >= WORTH * usual)}: ≥ {WORTH}), phases at most {max(sizes):.0f} MB;"
            f" {_cpu_report(running, cpu, done)}"
        )


def _cpu(running: BenchCluster) -> dict[str, float]:
    return {name: cpu_s(pid) for name, pid in running.processes.items()}


def _cpu_report(running: BenchCluster, before: dict[str, float], tasks: int) -> str:
    """Return the words for what a task has taken since, by process."""
    took = {name: 1e6 * (now - before[name]) / max(tasks, 1) for name, now in _cpu(running).items()}
    return "CPU µs a task: " + ", ".join(f"{name} {each:,.0f}" for name, each in took.items())
