"""What the benchmarks count: tasks in a second, times, and what processes take for them."""

import asyncio
import gc
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6


class Contender(Protocol):
    """What carries tasks."""

    @property
    def processes(self) -> Mapping[str, int]:
        """Name -> process id of each that works for it."""
        ...

    async def carry(self, tasks: int, at_once: int) -> list[float]:
        """Carry tasks with so many under way at any time, and return how long each took, in seconds."""
        ...


@dataclass(frozen=True)
class Load:
    """What came of carrying tasks with so many under way."""

    at_once: int
    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: Mapping[str, float]
    """process -> CPU time for each task"""
    rss_mb: Mapping[str, float]
    """process -> memory afterwards"""

    @property
    def cpu_total_us(self) -> float:
        return sum(self.cpu_us.values())


async def load(contender: Contender, tasks: int, at_once: int) -> Load:
    gc.collect()
    processes = contender.processes
    before = {name: cpu_s(pid) for name, pid in processes.items()}
    started = time.perf_counter()
    times = await contender.carry(tasks, at_once)
    seconds = time.perf_counter() - started
    return Load(
        at_once=at_once,
        per_s=len(times) / seconds,
        p50_ms=1e3 * quantile(times, 0.5),
        p99_ms=1e3 * quantile(times, 0.99),
        cpu_us={name: 1e6 * (cpu_s(pid) - before[name]) / len(times) for name, pid in processes.items()},
        rss_mb={name: rss_mb(pid) for name, pid in processes.items()},
    )


async def closed_loop(once: Callable[[], Awaitable[object]], tasks: int, at_once: int) -> list[float]:
    """Call `once` so often, so many at any time, and return how long each call took, in seconds."""
    times: list[float] = []
    left = iter(range(tasks))

    async def one_after_another() -> None:
        for _ in left:
            started = time.perf_counter()
            await once()
            times.append(time.perf_counter() - started)

    await asyncio.gather(*(one_after_another() for _ in range(min(at_once, tasks))))
    return times


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process so far, its own and the system's for it; in ticks of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def rss_mb(pid: int) -> float:
    """Return the resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MB


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def verdict(kept: bool) -> str:
    """Return the word for a promise that is kept, or is not."""
    return "pass" if kept else "MISS"


def middle(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each name's values."""
    return {name: median(row[name] for row in rows) for name in rows[0]}
