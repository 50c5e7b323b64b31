"""The floor in the world of a scenario, and the sizes of the messages that the loop publishes there."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import nats
from nats.aio.msg import Msg

from bench.floor.floor_world import FloorWorld, MessageSizes, Pattern
from bench.scenarios.loop_cluster import hosts_by_process, namespaces, phase_groups, start_hosts, start_phases
from bench.scenarios.process_group import Checkout, ProcessGroup, process_group
from bench.scenarios.scenario import Scenario
from loom.bus.subjects import Subjects
from loom.schemas.envelope import Phase

PROGRAMS = Path(__file__).parent
SETTLE_S = 0.2
"""Seconds after a task until ADAPT has written the profile."""


@asynccontextmanager
async def floor_cluster(scenario: Scenario, pattern: Pattern, sizes: MessageSizes) -> AsyncIterator[ProcessGroup]:
    """Run phases, hosts and submitters of the floor on a new server."""
    async with process_group(Checkout()) as group:
        for namespace in namespaces(scenario):
            world = FloorWorld(
                pattern=pattern,
                hosts=tuple(host_names(scenario)),
                nodes_each=scenario.nodes_each,
                fail_every=scenario.fail_every,
                sizes=sizes,
            )
            await _start(group, scenario, namespace, msgspec.json.encode(world).decode())
        yield group


async def _start(group: ProcessGroup, scenario: Scenario, namespace: str, world: str) -> None:
    await start_phases(group, namespace, _active_phases(scenario), PROGRAMS / "run_phases.py", world)
    await start_hosts(group, scenario, namespace, PROGRAMS / "run_hosts.py", world)
    await group.start_submitter(f"submitter {namespace}", PROGRAMS / "run_submitter.py", world, namespace=namespace)


def _active_phases(scenario: Scenario) -> list[list[Phase]]:
    """Return the phases of each process without the replicas of ADAPT that stand by."""
    processes = phase_groups(scenario)
    first = len(processes) // scenario.replicas
    return processes[:first] + [[phase for phase in phases if phase != "adapt"] for phases in processes[first:]]


def host_names(scenario: Scenario) -> Iterator[str]:
    """Yield the names of a scenario's hosts."""
    for number, hosts in enumerate(hosts_by_process(scenario)):
        yield from (f"p{number}-{host}" for host in range(hosts))


async def measured_sizes(group: ProcessGroup) -> MessageSizes:
    """Return the sizes of the messages of one task through a running loop."""
    return _as_sizes(await record_messages(group))


async def record_messages(group: ProcessGroup, namespace: str = "loom") -> Mapping[str, list[int]]:
    """Carry one task, and return the bytes of its messages by their kind: phase, bucket, or family of the subject."""
    sizes: defaultdict[str, list[int]] = defaultdict(list)

    async def add(msg: Msg) -> None:
        if name := _kind(msg.subject, namespace):
            sizes[name].append(len(msg.data))

    connection = await nats.connect(group.url)
    try:
        for subject in (f"{namespace}.>", "$KV.>"):
            await connection.subscribe(subject, cb=add)
        await connection.flush()
        await group.carry(1, 1)
        await asyncio.sleep(SETTLE_S)
        await connection.flush()
    finally:
        await connection.close()
    return sizes


def _kind(subject: str, namespace: str) -> str:
    """Return the name of a message by its subject; empty for a message that is not part of a task."""
    if subject.startswith("$KV."):
        bucket = subject.split(".")[1]
        return bucket.removeprefix(f"{namespace}_") if bucket.startswith(f"{namespace}_") else ""
    parsed = Subjects(namespace).parse(subject)
    if parsed is None:
        return ""
    return parsed.tokens["phase"] if parsed.family == "task" else parsed.family


def _as_sizes(sizes: Mapping[str, list[int]]) -> MessageSizes:
    """Return the last size of each kind; a kind that the loop does not publish keeps its usual size."""
    renamed = {"intake": "submission", "auction": "call", "nodes": "profile"}
    fields = set(MessageSizes.__struct_fields__)
    names = {kind: renamed.get(kind, kind) for kind in sizes}
    measured = {name: sizes[kind][-1] for kind, name in names.items() if name in fields}
    if len(records := sizes.get("records", [])) > 1:
        measured |= {"record_created": records[0], "record_claimed": records[-2], "record_ended": records[-1]}
    if events := sizes.get("event"):
        measured["run_ended"] = events[-1]
    return MessageSizes(**measured)
