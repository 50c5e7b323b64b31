"""A cluster of processes that is killed on a schedule while tasks are submitted, with a check of its invariants.

Run as a script for a long check: `python -m support.kill_run --tasks 2000 --kills 60 --seed 1`, with tests/ on
PYTHONPATH. With `--parts 8 --tasks 50` the tasks are divided, and the cost of a subtask is measured first. With
`--mixed` some tasks are cancelled, some delegate, some are divided, and processes are also stopped for 5 to 40 s.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from loom.bus import task_client, topology
from loom.bus.bus import Bus
from loom.runner.server.nats_server import NatsServer
from loom.schemas.base import new_id
from loom.schemas.envelope import PHASES
from loom.schemas.errors import LoomError
from loom.schemas.task import TaskAd
from support.invariants import ClusterState, check, learned_state
from support.kill_schedule import ProcessCluster, schedule
from support.wait import until
from support.workload import Workload, chain

AGENTS = Path(__file__).parents[1] / "data" / "recording_agents.py"
NODES = ("ada", "ben", "cyd")
TARGETS_OF_DIVIDED = ("scale", "execute", "all", *NODES)
"""Processes that are killed while tasks are divided."""
MEASURED = 20
"""Tasks of each kind with which the cost of a subtask is measured."""


async def run_under_kills(
    folder: Path,
    *,
    count: int,
    per_s: float,
    kills: int,
    every_s: float,
    seed: int,
    ack_wait_s: int,
    parts: int = 0,
    mixed: bool = False,
) -> str:
    """Submit tasks while processes are killed, check the invariants, and return a report.

    Args:
        folder: Where the store of the server, the logs and the list of runs are written.
        count: Tasks to submit.
        per_s: Submissions per second.
        kills: Processes to kill, the server among them.
        every_s: Mean seconds between two kills.
        seed: Start of the random numbers of the schedule and of the graphs.
        ack_wait_s: Seconds after which the server delivers an unacknowledged message again.
        parts: Subtasks of each task. Above 0 only SCALE, EXECUTE and nodes are killed.
        mixed: Whether some tasks are cancelled, delegate or are divided, and every third kill stops a process instead.

    Raises:
        AssertionError: An invariant was violated.
    """
    runs = folder / "runs"
    runs.touch()
    started = time.monotonic()
    server = NatsServer(folder / "store")
    server.start()
    phases = {name: [name] for name in PHASES} | {"all": PHASES}
    env = {"TEST_RUNS_FILE": str(runs), "TEST_ACK_WAIT_S": str(ack_wait_s), "LOOM_LOG_LEVEL": "info"}
    try:
        async with (
            Bus(server.url) as bus,
            ProcessCluster(server, folder, phases, NODES, AGENTS, env) as cluster,
        ):
            await until(lambda: _is_up(bus), within_s=30, what="the cluster is up")
            cost = await overhead(bus, parts) if parts else ""
            workload = Workload(bus, parts, mixed, random.Random(seed))
            watching = asyncio.ensure_future(workload.watch())
            async with asyncio.TaskGroup() as group:
                group.create_task(workload.submit(count, per_s))
                targets = TARGETS_OF_DIVIDED if parts else cluster.targets
                group.create_task(cluster.run_schedule(schedule(seed, targets, kills, every_s, stops=mixed)))
            last_kill = time.monotonic()
            await workload.settled(within_s=180)
            state = await learned_state(bus)
            watching.cancel()
            assert not watching.done() or watching.cancelled()
            check(workload, state, runs.read_text().splitlines())
            now = time.monotonic()
            return report(workload, state, cluster, now - started, now - last_kill) + cost
    finally:
        await asyncio.to_thread(server.stop)


async def _is_up(bus: Bus) -> bool:
    try:
        await topology.stream_state(bus, "DEAD")
        probe = await task_client.publish(bus, TaskAd(task_id=new_id(), description="probe", domain="code"))
        return (await probe.result(20)).success
    except (LoomError, TimeoutError):
        return False


async def overhead(bus: Bus, parts: int) -> str:
    """Measure what a subtask costs compared with an undivided task, in a cluster without kills.

    The subtasks do nothing and depend on one another, so that a divided task takes as long as all of them.
    """

    async def took_s(context: dict[str, Any]) -> float:
        begun = time.monotonic()
        ad = TaskAd(task_id=new_id(), description="nothing", domain="code", context=context)
        handle = await task_client.publish(bus, ad, deltas=False)
        assert (await handle.result(60)).success
        return time.monotonic() - begun

    plain = statistics.median([await took_s({}) for _ in range(MEASURED)])
    divided = statistics.median([await took_s(chain(parts)) for _ in range(MEASURED)])
    subtask = (divided - plain) / parts
    return (
        f"\nundivided task: {plain * 1000:.1f} ms; {parts} subtasks in a chain: {divided * 1000:.1f} ms, "
        f"{subtask * 1000:.1f} ms per subtask, overhead {(subtask - plain) * 1000:+.1f} ms"
    )


def report(workload: Workload, state: ClusterState, cluster: ProcessCluster, took_s: float, quiet_s: float) -> str:
    """Return the figures of a run: ends, attempts, kills, plans and rewards."""
    ends = Counter(
        record.state if record.envelope.error is None else f"{record.state} ({record.envelope.error.code})"
        for record in state.records.values()
    )
    attempts = Counter(record.envelope.attempt for record in state.records.values())
    failed = Counter(attempt.code for record in state.records.values() for attempt in record.envelope.failed_attempts)
    repeated = len(state.rewards) - len({reward.reward_id for _, reward in state.rewards})
    subtasks = Counter(part.state for plan in state.plans.values() for part in plan.subtasks)
    waits = sorted(
        (record.ended_at or 0) - (record.envelope.deadline - record.envelope.ad.timeout_s)
        for record in state.records.values()
    )
    return "\n".join(
        (
            f"{len(workload.accepted)} accepted, {workload.refused} not acknowledged, 0 lost, in {took_s:.0f} s",
            f"ends: {dict(ends)}, after a median of {waits[len(waits) // 2]:.2f} s, the slowest {waits[-1]:.1f} s",
            f"attempts needed: {dict(sorted(attempts.items()))}, failed ones: {dict(failed)}",
            f"kills: {cluster.killed.total()}, {dict(sorted(cluster.killed.items()))}; quiet {quiet_s:.1f} s later",
            f"divided: {len(state.plans)}, their subtasks: {dict(subtasks)}",
            f"rewards: {len(state.rewards)}, {repeated} of them repeated and counted once; dead letters: {state.dead}",
        )
    )


def main() -> None:
    """Run the check with the arguments of the command line, and print the report."""
    parser = argparse.ArgumentParser()
    for name, value in (("tasks", 2000), ("kills", 60), ("seed", 1), ("ack-wait", 30), ("parts", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--per-s", type=float, default=25)
    parser.add_argument("--every-s", type=float, default=1.2)
    parser.add_argument("--mixed", action="store_true", help="Cancel, delegate and divide tasks, and stop processes.")
    parser.add_argument("--keep", type=Path, help="Folder for logs and streams.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as private:
        folder = args.keep or Path(private)
        folder.mkdir(parents=True, exist_ok=True)
        running = run_under_kills(
            folder,
            count=args.tasks,
            per_s=args.per_s,
            kills=args.kills,
            every_s=args.every_s,
            seed=args.seed,
            ack_wait_s=args.ack_wait,
            parts=args.parts,
            mixed=args.mixed,
        )
        print(asyncio.run(running))


if __name__ == "__main__":
    main()
