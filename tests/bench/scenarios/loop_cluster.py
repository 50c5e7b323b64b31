"""The whole loop of one checkout in the world of a scenario."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bench.scenarios.process_group import Checkout, ProcessGroup, process_group
from bench.scenarios.scenario import Scenario
from loom.schemas.envelope import PHASES, Phase

PROGRAMS = Path(__file__).parents[1] / "checkout"


@asynccontextmanager
async def loop_cluster(scenario: Scenario, checkout: Checkout) -> AsyncIterator[ProcessGroup]:
    """Run phases, hosts and submitters of a checkout on a new server."""
    async with process_group(checkout) as group:
        for namespace in namespaces(scenario):
            await _start_phases(group, scenario, namespace)
            await start_hosts(group, scenario, namespace, PROGRAMS / "run_hosts.py", str(scenario.fail_every))
        for namespace in namespaces(scenario):
            await group.start_submitter(f"submitter {namespace}", PROGRAMS / "run_submitter.py", namespace=namespace)
        yield group


async def _start_phases(group: ProcessGroup, scenario: Scenario, namespace: str) -> None:
    for number, phases in enumerate(phase_groups(scenario)):
        name = f"phases {namespace} {number}"
        program = PROGRAMS / "run_phases.py"
        await group.start(name, program, *phases, namespace=namespace)


async def start_hosts(group: ProcessGroup, scenario: Scenario, namespace: str, program: Path, *words: str) -> None:
    """Start the scenario's hosts in its number of processes."""
    processes = min(scenario.host_processes, scenario.hosts)
    for number in range(processes):
        hosts = scenario.hosts // processes + (number < scenario.hosts % processes)
        arguments = (f"p{number}", str(hosts), str(scenario.nodes_each), *words)
        await group.start(f"hosts {namespace} {number}", program, *arguments, namespace=namespace)


def phase_groups(scenario: Scenario) -> list[list[Phase]]:
    """Return the phases of each process; those of the first replica come first."""
    groups: list[list[Phase]] = [[phase] for phase in PHASES] if scenario.phase_processes else [list(PHASES)]
    return groups * scenario.replicas


def namespaces(scenario: Scenario) -> list[str]:
    """Return the names of the scenario's namespaces."""
    return [f"loom{number or ''}" for number in range(scenario.namespaces)]
