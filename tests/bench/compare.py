"""Compare two checkouts in interleaved rounds: `python tests/bench/compare.py --baseline PATH --scenario two-nodes`.

Both checkouts run the same programs of the benchmark, each with the Python of its own `.venv`. CPU time is that of
phases, hosts, server and submitter together. On a machine with other work only the CPU times are reliable.
"""

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).parents[1]))

from bench.scenarios.loop_cluster import loop_cluster
from bench.scenarios.measurement import Measurement, measure
from bench.scenarios.process_group import ROLES, ROOT, Checkout, cpu_by_role
from bench.scenarios.scenario import SCENARIOS, Scenario
from loom.runner import log_output

ROUNDS = 5
Rounds = Mapping[str, Sequence[Measurement]]
"""`baseline` and `candidate` -> one measurement for each round."""


async def compare(scenario: Scenario, baseline: Checkout, candidate: Checkout, rounds: int) -> Rounds:
    """Measure both checkouts in turn; every other round starts with the candidate."""
    sides = {"baseline": baseline, "candidate": candidate}
    measured: dict[str, list[Measurement]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sorted(sides, reverse=number % 2 == 1):
            print(f"{scenario.title}: round {number + 1} of {rounds}, {side}", file=sys.stderr, flush=True)
            measured[side].append(await measure(loop_cluster(scenario, sides[side]), scenario))
    return measured


def report(scenario: Scenario, rounds: Rounds) -> Iterator[str]:
    """Yield the medians of both sides, and the median of the rounds' ratios with its range."""
    yield f"{scenario.title}: medians of {len(rounds['baseline'])} rounds"
    header = "".join(f"{role:>11}" for role in (*ROLES, "total"))
    yield f"  {'CPU µs a task':14}{header}{'tasks/s':>11}{'p50 ms':>9}"
    for side, measurements in rounds.items():
        cpu = [cpu_by_role(measurement.many) for measurement in measurements]
        cells = "".join(f"{median(row[role] for row in cpu):11,.0f}" for role in ROLES)
        total = median(measurement.cpu_us for measurement in measurements)
        per_s = median(measurement.many.per_s for measurement in measurements)
        p50_ms = median(measurement.single.p50_ms for measurement in measurements)
        failures = sum((Counter(measurement.failures) for measurement in measurements), Counter())
        failed = f"  failed tasks: {dict(failures)}" if failures else ""
        yield f"  {side:14}{cells}{total:11,.0f}{per_s:11,.0f}{p50_ms:9.2f}{failed}"
    yield (
        f"  candidate / baseline: CPU {_ratio([_cpu_us(side) for side in rounds.values()])},"
        f" tasks/s {_ratio([[each.many.per_s for each in side] for side in rounds.values()])},"
        f" p50 {_ratio([[each.single.p50_ms for each in side] for side in rounds.values()])}"
    )


def growth(first: Scenario, second: Scenario, measured: Mapping[str, Rounds]) -> str:
    """Return the line on how much more CPU a task of the candidate takes in the second scenario than in the first."""
    ratio = _ratio([_cpu_us(measured[scenario.name]["candidate"]) for scenario in (first, second)])
    return f"candidate, {second.title} / {first.title}: CPU {ratio}"


def _cpu_us(measurements: Sequence[Measurement]) -> list[float]:
    return [measurement.cpu_us for measurement in measurements]


def _ratio(sides: Sequence[Sequence[float]]) -> str:
    below, above = sides
    ratios = [value / base for base, value in zip(below, above, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


async def run(chosen: Sequence[Scenario], baseline: Checkout, candidate: Checkout, rounds: int) -> None:
    """Compare the checkouts in each scenario, and print what has been measured after each."""
    measured: dict[str, Rounds] = {}
    for scenario in chosen:
        measured[scenario.name] = await compare(scenario, baseline, candidate, rounds)
        print("\n".join(report(scenario, measured[scenario.name])), flush=True)
    for scenario in chosen[1:]:
        print(growth(chosen[0], scenario, measured))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, required=True, help="Checkout to compare with; it has a .venv.")
    parser.add_argument("--candidate", type=Path, default=ROOT, help="Checkout to measure; this one by default.")
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=["two-nodes", "32-nodes", "50-hosts"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tasks", type=int, help="Tasks for each figure; by default those of the scenario.")
    parser.add_argument("--single", type=int, help="Tasks with one in flight; by default those of the scenario.")
    given = parser.parse_args()
    log_output.configure("error")
    amounts = {name: value for name in ("tasks", "single") if (value := getattr(given, name))}
    chosen = [replace(SCENARIOS[name], **amounts) for name in given.scenario]
    baseline, candidate = (Checkout(path.resolve()) for path in (given.baseline, given.candidate))
    asyncio.run(run(chosen, baseline, candidate, given.rounds))


if __name__ == "__main__":
    main()
