"""Where the time of the phases goes: six in one process, under cProfile while tasks are carried."""

import asyncio
import os
import pstats
import re
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.wait import until

from bench.bench_cluster import whole_loop
from bench.measure import load

TOP = 25
LARGEST = 3
WITHIN_S = 60
_WAITING = re.compile(r"run_until_complete|run_forever|'poll' of 'select\.")
"""Where an event loop spends the time in which there is nothing to do."""

Function = tuple[str, int, str]
"""File, line, name; the file of a built-in is `~`."""


async def profile(file: Path, tasks: int, at_once: int) -> None:
    """Write to `file`, not there yet, what the phases did while carrying tasks."""
    async with whole_loop(profile=file) as running:
        await running.carry(at_once, at_once)
        pid = running.processes["phases"]
        os.kill(pid, signal.SIGUSR1)
        await load(running, tasks, at_once)
        os.kill(pid, signal.SIGUSR2)
        await until(file.exists, within_s=WITHIN_S, what="the profile is written")


def largest(file: Path, cpu_us: float) -> Iterator[str]:
    """Yield the largest items of a profile, by module and by function, as shares of `cpu_us` for each task."""
    for kind, shares in zip(("module", "function"), _shares(_table(file)), strict=True):
        parts = (f"{name} {share:.0%} (≈ {share * cpu_us:.0f} µs)" for name, share in shares.most_common(LARGEST))
        yield f"{kind:9} {', '.join(parts)}"


def top(file: Path) -> None:
    """Print the functions that took the most time themselves."""
    pstats.Stats(str(file)).sort_stats("tottime").print_stats(TOP)


def _table(file: Path) -> dict[Function, Any]:
    return pstats.Stats(str(file)).stats  # type: ignore[attr-defined,no-any-return]  # documented, but not typed


def _shares(table: dict[Function, Any]) -> tuple[Counter[str], Counter[str]]:
    """Return module -> share and function -> share of all time that was not waited; built-ins are their callers'."""
    modules: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    for function, (_, _, own_s, _, callers) in table.items():
        if _WAITING.search(function[2]):
            continue
        functions[_name(function)] += own_s
        if function[0] != "~":
            modules[_module(function)] += own_s
            continue
        for caller, (_, _, part_s, _) in callers.items():
            modules[_module(caller)] += part_s
    for counted in (modules, functions):
        total = sum(counted.values())
        for name in counted:
            counted[name] /= total  # type: ignore[assignment]  # shares
    return modules, functions


def _module(function: Function) -> str:
    if function[0] == "~":
        return "built-in"
    parts = Path(function[0]).with_suffix("").parts
    tops = [number for number, part in enumerate(parts) if part in {"loom", "site-packages"} or part[:6] == "python"]
    start = tops[-1] + 1 if tops else len(parts) - 2
    return ".".join(parts[start:])


def _name(function: Function) -> str:
    return function[2].strip("<>") if function[0] == "~" else f"{_module(function)}.{function[2]}"


async def largest_left(file: Path | None, tasks: int, at_once: int, cpu_us: float) -> list[str]:
    """Profile the phases, keep that in `file` if one is given, and return a report of it."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "phases.prof"
        await profile(made, tasks, at_once)
        if file is not None:
            await asyncio.to_thread(shutil.copyfile, made, file)
        return list(largest(made, cpu_us))
