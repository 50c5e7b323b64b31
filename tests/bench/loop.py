"""What the loop costs compared with the bus it runs on: `python tests/bench/loop.py`, or `make bench`.

A task through the whole loop (an auction, a claim, a run that does nothing on one of two node hosts, a record, a
reward, what is learned of it) compared with a message through six no-op hops: written on nats-py alone as fast as it
goes (`raw pipe`), and by FastStream. Each is started afresh on a server of its own, one after the other, in rounds;
what is printed are medians over the rounds, and each figure's ratio to the raw pipe of the same round.

This process publishes the tasks with `loom.bus.task_client.publish`, without deltas and with a constant number under
way: what `Runtime.submit` does, less a layer. `--by-request` sends requests to `loom.submit` instead, which take less
of a client and more of SENSE.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from bench import faststream_chain, profiling
from bench.bench_cluster import of_phases, whole_loop
from bench.measure import Contender, Load, load, middle, verdict
from bench.raw_pipe import raw_pipe
from loom.runner import log_output
from loom.runner.cli.entry import run_to_end

ROUNDS = 3
SYSTEM_S = 30
"""Seconds that one system takes in a round, on a machine with two cores."""
TASKS, QUICK_TASKS = 3000, 500
SINGLE, QUICK_SINGLE = 300, 100
"""Tasks carried one at a time."""
IN_FLIGHT = (64, 256, 1000)
USUAL = 256
RAW, PEER, LOOP, SPREAD = "raw pipe", "FastStream", "loop, 1 process", "loop, 6 processes"

Loads = Mapping[int, Load]
"""In flight -> what came of it."""
Round = Mapping[str, Loads]
"""Contender -> its loads."""
Contest = Mapping[str, Callable[[], AbstractAsyncContextManager[Contender]]]

SHORT = {"peer": PEER, "loop": LOOP, "spread": SPREAD}
SLOW = {PEER: 3}
"""Carries fewer tasks by this factor, to be done in time."""
CHECKS: Sequence[tuple[str, Callable[[Sequence[Round]], float], float, bool]] = (
    ("throughput at 256 in flight ≥ 0.5 of the raw pipe", lambda r: ratio(r, LOOP, USUAL, per_s), 0.5, True),
    ("throughput at 256 in flight ≥ 2 times FastStream", lambda r: ratio(r, LOOP, USUAL, per_s, PEER), 2.0, True),
    ("p50 with one in flight ≤ 2.5 times the raw pipe", lambda r: ratio(r, LOOP, 1, p50_ms), 2.5, False),
)
"""What is promised of six phases in one process: words, figure, limit, whether it is the least."""


def contest(chosen: Sequence[str], *, by_request: bool) -> Contest:
    """Return the raw pipe and those of the others that are chosen and can be started."""
    everyone: Contest = {
        RAW: raw_pipe,
        PEER: faststream_chain.faststream_chain,
        LOOP: partial(whole_loop, by_request=by_request),
        SPREAD: partial(whole_loop, by_request=by_request, together=False),
    }
    wanted = {RAW, *(SHORT[short] for short in chosen)}
    if not faststream_chain.installed():
        wanted.discard(PEER)
    return {name: start for name, start in everyone.items() if name in wanted}


async def measure(contenders: Contest, name: str, tasks: int, single: int) -> Loads:
    """Return what one contender does, started afresh."""
    fewer = SLOW.get(name, 1)
    async with contenders[name]() as contender:
        await contender.carry(max(tasks // fewer // 4, 50), 16)
        loads = {1: await load(contender, single, 1)}  # first: learning goes on for a while after many
        for at_once in IN_FLIGHT:
            loads[at_once] = await load(contender, max(tasks // fewer, at_once), at_once)
        return loads


async def play(contenders: Contest, rounds: int, tasks: int, single: int) -> list[Round]:
    """Measure all contenders, one after another, so often."""
    played: list[Round] = []
    for number in range(1, rounds + 1):
        figures: dict[str, Loads] = {}
        for name in contenders:
            print(f"round {number} of {rounds}: {name}", file=sys.stderr, flush=True)
            figures[name] = await measure(contenders, name, tasks, single)
        played.append(figures)
    return played


def per_s(figures: Load) -> float:
    return figures.per_s


def p50_ms(figures: Load) -> float:
    return figures.p50_ms


def p99_ms(figures: Load) -> float:
    return figures.p99_ms


def cpu_us(figures: Load) -> float:
    return figures.cpu_total_us


def typical(rounds: Sequence[Round], name: str, at_once: int, of: Callable[[Load], float]) -> float:
    """Return the median over the rounds."""
    return median(of(each[name][at_once]) for each in rounds)


def ratio(rounds: Sequence[Round], name: str, at_once: int, of: Callable[[Load], float], to: str = RAW) -> float:
    """Return the median over the rounds of a figure against that of another contender in the same round."""
    return median(of(each[name][at_once]) / of(each[to][at_once]) for each in rounds)


def report(rounds: Sequence[Round]) -> Iterator[str]:
    """Yield the tables, figures with their ratios to the raw pipe in brackets."""
    names = list(rounds[0])

    def cells(name: str, wanted: Sequence[tuple[int, Callable[[Load], float]]], form: str) -> str:
        return " ".join(
            f"{format(typical(rounds, name, at_once, of), form):>10} ({ratio(rounds, name, at_once, of):6.2f})"
            for at_once, of in wanted
        )

    yield f"{'tasks/s (of raw pipe), in flight:':32}" + " ".join(f"{at_once:>10,}{'':9}" for at_once in IN_FLIGHT)
    for name in names:
        yield f"  {name:30}" + cells(name, [(at_once, per_s) for at_once in IN_FLIGHT], ",.0f")
    yield ""
    yield f"{'ms (of raw pipe), 1 in flight:':32}{'p50':>10}{'':10}{'p99':>10}"
    for name in names:
        yield f"  {name:30}" + cells(name, [(1, p50_ms), (1, p99_ms)], ".2f")
    yield ""
    yield f"{f'CPU µs a task, {USUAL} in flight:':32}{'all':>10}"
    for name in names:
        split = middle([each[name][USUAL].cpu_us for each in rounds])
        parts = ", ".join(f"{process} {took:,.0f}" for process, took in split.items())
        yield f"  {name:30}{cells(name, [(USUAL, cpu_us)], ',.0f')}  {parts}"
    yield ""
    yield f"memory in MB, after {IN_FLIGHT[-1]:,} in flight"
    for name in names:
        sizes = middle([each[name][IN_FLIGHT[-1]].rss_mb for each in rounds])
        yield f"  {name:30}{', '.join(f'{process} {size:,.0f}' for process, size in sizes.items())}"


def checks(rounds: Sequence[Round]) -> Iterator[str]:
    """Yield what is promised, and whether it is kept."""
    for words, figure, limit, at_least in CHECKS:
        if PEER in words and PEER not in rounds[0]:
            yield f"  ?    {words}: not measured"
            continue
        value = figure(rounds)
        kept = value >= limit if at_least else value <= limit
        yield f"  {verdict(kept)} {words}: {value:.2f}"


async def whole(contenders: Contest, rounds: int, tasks: int, single: int) -> None:
    """Measure, print all that came of it, and what the phases spend their time on."""
    played = await play(contenders, rounds, tasks, single)
    for line in report(played):
        print(line)
    if not faststream_chain.installed():
        print(f"\n{PEER}: {faststream_chain.MISSING}")
    if LOOP not in contenders:
        return
    print(f"\npromised, of six phases in one process; medians of {rounds} interleaved rounds")
    for line in checks(played):
        print(line)
    budget = middle([each[LOOP][USUAL].cpu_us for each in played])
    took = sum(budget[name] for name in of_phases(list(budget)))
    print(f"\nlargest items of the {took:,.0f} µs the phases take for a task, by their own time", flush=True)
    for line in await profiling.largest_left(None, tasks, USUAL, took):
        print(f"  {line}")


async def profile_alone(file: Path, tasks: int) -> None:
    """Print where the time of six phases in one process goes, and nothing else."""
    async with whole_loop() as running:
        await running.carry(USUAL, USUAL)
        figures = await load(running, tasks, USUAL)
    lines = await profiling.largest_left(file, tasks, USUAL, figures.cpu_us["phases"])
    profiling.top(file)
    print(f"largest items of the {figures.cpu_us['phases']:,.0f} µs the phases take for a task, by their own time")
    for line in lines:
        print(f"  {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help=f"How often all is measured; {ROUNDS} by default.")
    parser.add_argument("--tasks", type=int, help=f"Tasks for each figure; {TASKS} by default.")
    parser.add_argument("--quick", action="store_true", help="One round of few tasks: a minute.")
    parser.add_argument("--only", nargs="+", choices=SHORT, default=list(SHORT), help="Which besides the raw pipe.")
    parser.add_argument("--by-request", action="store_true", help="Hand tasks in by requests to loom.submit.")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="Only profile the phases, into FILE.")
    given = parser.parse_args()
    log_output.configure("error")
    tasks = given.tasks or (QUICK_TASKS if given.quick else TASKS)
    work: Any
    if given.profile:
        work = profile_alone(given.profile, tasks)
    else:
        rounds = given.rounds or (1 if given.quick else ROUNDS)
        contenders = contest(given.only, by_request=given.by_request)
        minutes = rounds * len(contenders) * SYSTEM_S / 60
        print(f"{rounds} rounds of {len(contenders)} systems take about {minutes:.0f} minutes", flush=True)
        work = whole(contenders, rounds, tasks, QUICK_SINGLE if given.quick else SINGLE)
    run_to_end(work)


if __name__ == "__main__":
    main()
