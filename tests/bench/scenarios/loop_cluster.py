"""The whole loop of one checkout in the world of a scenario."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
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
            await start_phases(group, namespace, phase_groups(scenario), PROGRAMS / "run_phases.py")
            await start_hosts(group, scenario, namespace, PROGRAMS / "run_hosts.py", str(scenario.fail_every))
        for namespace in namespaces(scenario):
            await group.start_submitter(f"submitter {namespace}", PROGRAMS / "run_submitter.py", namespace=namespace)
        yield group


async def start_phases(
    group: ProcessGroup, namespace: str, processes: Sequence[Sequence[Phase]], program: Path, *words: str
) -> None:
    """Start the processes of the phases: the first creates the streams, then the others start together."""
    first, *others = (
        partial(group.start, f"phases {namespace} {number}", program, *words, *phases, namespace=namespace)
        for number, phases in enumerate(processes)
    )
    await first()
    await asyncio.gather(*(start() for start in others))


async def start_hosts(group: ProcessGroup, scenario: Scenario, namespace: str, program: Path, *words: str) -> None:
    """Start the scenario's hosts in its number of processes."""
    starts = []
    for number, hosts in enumerate(hosts_by_process(scenario)):
        arguments = (f"p{number}", str(hosts), str(scenario.nodes_each), *words)
        starts.append(group.start(f"hosts {namespace} {number}", program, *arguments, namespace=namespace))
    await asyncio.gather(*starts)


def hosts_by_process(scenario: Scenario) -> list[int]:
    """Return the number of hosts of each process that runs hosts."""
    processes = min(scenario.host_processes, scenario.hosts)
    return [scenario.hosts // processes + (number < scenario.hosts % processes) for number in range(processes)]


def phase_groups(scenario: Scenario) -> list[list[Phase]]:
    """Return the phases of each process; those of the first replica come first."""
    groups: list[list[Phase]] = [[phase] for phase in PHASES] if scenario.phase_processes else [list(PHASES)]
    return groups * scenario.replicas


def namespaces(scenario: Scenario) -> list[str]:
    """Return the names of the scenario's namespaces."""
    return [f"loom{number or ''}" for number in range(scenario.namespaces)]
