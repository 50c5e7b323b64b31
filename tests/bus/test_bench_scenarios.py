"""The scenarios of the benchmark, its floors, and the comparison of two checkouts; the numbers are tiny."""

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from bench import compare, costs
from bench.floor.floor_cluster import floor_cluster, host_names, record_messages
from bench.floor.floor_world import MessageSizes, Pattern
from bench.measure import Load
from bench.scenarios.loop_cluster import loop_cluster, namespaces, phase_groups
from bench.scenarios.measurement import Measurement, measure
from bench.scenarios.process_group import ROLES, Checkout, cpu_by_role
from bench.scenarios.scenario import SCENARIOS, Scenario

WITHIN_S = 90
KINDS = ("intake", "records", "match", "auction", "offer", "scale", "execute", "run", "event", "delta", "evaluate")
"""Kinds of messages of a task before its end."""


def tiny(scenario: Scenario) -> Scenario:
    """Return a scenario with few hosts, nodes, replicas and tasks."""
    return replace(
        scenario,
        hosts=min(scenario.hosts, 3),
        nodes_each=min(scenario.nodes_each, 3),
        host_processes=min(scenario.host_processes, 2),
        fail_every=min(scenario.fail_every, 4),
        replicas=min(scenario.replicas, 2),
        tasks=8,
        single=1,
        in_flight=4,
    )


def measurement(cpu_us: float, *, per_s: float = 1000.0, failures: int = 0) -> Measurement:
    cpu = {"server": cpu_us / 4, "phases loom 0": cpu_us / 4, "hosts loom 0": cpu_us / 4, "submitter loom": cpu_us / 4}
    figures = Load(1, per_s=per_s, p50_ms=2.0, p99_ms=4.0, cpu_us=cpu, rss_mb=dict.fromkeys(cpu, 10.0))
    return Measurement(figures, figures, {"no_bids": failures} if failures else {})


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
async def test_every_scenario_carries_its_tasks_through_the_loop(scenario: Scenario) -> None:
    async with asyncio.timeout(WITHIN_S):
        measured = await measure(loop_cluster(tiny(scenario), Checkout()), tiny(scenario))
    assert sum(measured.failures.values()) == 0 or scenario.fail_every
    assert measured.many.per_s > 0
    assert set(cpu_by_role(measured.many)) == set(ROLES)
    processes = Counter(name.split()[0] for name in measured.many.cpu_us)
    assert processes["submitter"] == scenario.namespaces
    assert processes["phases"] == scenario.namespaces * len(phase_groups(tiny(scenario)))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["full", "reduced"])
@pytest.mark.parametrize("name", ["failures", "1000-hosts", "six-processes", "replicas", "namespaces"])
async def test_the_floor_carries_every_task(name: str, pattern: Pattern) -> None:
    scenario = tiny(SCENARIOS[name])
    async with asyncio.timeout(WITHIN_S):
        measured = await measure(floor_cluster(scenario, pattern, MessageSizes()), scenario)
    assert measured.many.per_s > 0
    assert set(cpu_by_role(measured.many)) == set(ROLES)


@pytest.mark.slow
async def test_the_reduced_floor_calls_a_part_of_many_hosts() -> None:
    scenario = replace(tiny(SCENARIOS["1000-hosts"]), hosts=70)
    async with asyncio.timeout(WITHIN_S), floor_cluster(scenario, "reduced", MessageSizes()) as group:
        sizes = await record_messages(group)
    assert len(sizes["offer"]) == 64


@pytest.mark.slow
async def test_the_loop_publishes_no_more_messages_than_the_full_floor() -> None:
    scenario = tiny(SCENARIOS["two-nodes"])
    async with asyncio.timeout(WITHIN_S):
        async with loop_cluster(scenario, Checkout()) as group:
            await group.carry(5, 1)
            loop = await record_messages(group)
        async with floor_cluster(scenario, "full", MessageSizes()) as group:
            floor = await record_messages(group)
    counts = {kind: (len(loop.get(kind, ())), len(floor[kind])) for kind in KINDS}
    assert all(published <= in_floor for published, in_floor in counts.values()), counts


@pytest.mark.slow
async def test_a_comparison_measures_both_checkouts_in_every_round() -> None:
    scenario = tiny(SCENARIOS["two-nodes"])
    async with asyncio.timeout(WITHIN_S):
        rounds = await compare.compare(scenario, Checkout(), Checkout(), 1)
    assert {side: len(measurements) for side, measurements in rounds.items()} == {"baseline": 1, "candidate": 1}


def test_a_report_has_the_medians_and_the_ratios_of_each_round() -> None:
    rounds = {
        "baseline": [measurement(1000), measurement(2000), measurement(3000)],
        "candidate": [measurement(500), measurement(1000), measurement(3000, failures=2)],
    }
    text = "\n".join(compare.report(SCENARIOS["two-nodes"], rounds))
    assert "CPU 0.50 (0.50 to 1.00)" in text
    assert "2,000" in text
    assert "failed tasks: {'no_bids': 2}" in text


def test_growth_is_that_of_the_candidate_between_two_scenarios() -> None:
    first, second = SCENARIOS["two-nodes"], SCENARIOS["200-nodes"]
    measured = {
        first.name: {"baseline": [measurement(10)], "candidate": [measurement(1000)]},
        second.name: {"baseline": [measurement(99)], "candidate": [measurement(1250)]},
    }
    assert "CPU 1.25" in compare.growth(first, second, measured)


def test_the_table_has_a_line_for_each_scenario_with_the_floors_next_to_it() -> None:
    bus = [{costs.RAW: measurement(200)}]
    rows = [{costs.LOOP: measurement(1000), costs.FULL: measurement(400), costs.REDUCED: measurement(250)}]
    lines = list(costs.table(bus, {"2 hosts": rows}))
    assert len({line.count("|") for line in lines}) == 1
    assert "| 2 hosts | 250 | 250 | 250 | 250 | 1,000 (400, 250) | 5.00 | 2.50 | 4.00 | - |" in lines[-1]


def test_the_table_in_the_documentation_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(f"before\n\n{costs.BEGIN}\nold\n{costs.END}\n\nafter\n")
    costs.write_docs(["new"], file)
    assert file.read_text() == f"before\n\n{costs.BEGIN}\nnew\n{costs.END}\n\nafter\n"


def test_the_documentation_has_a_place_for_the_table() -> None:
    text = costs.DOCS.read_text()
    assert text.count(costs.BEGIN) == text.count(costs.END) == 1


def test_hosts_are_spread_over_the_processes() -> None:
    scenario = replace(SCENARIOS["two-nodes"], hosts=5, host_processes=2)
    assert list(host_names(scenario)) == ["p0-0", "p0-1", "p0-2", "p1-0", "p1-1"]


def test_each_namespace_has_a_name_of_its_own() -> None:
    assert namespaces(SCENARIOS["namespaces"]) == ["loom", "loom1"]
