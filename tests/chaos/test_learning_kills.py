"""ADAPT, MATCH and EVALUATE are killed while profiles are learned: each reward of the stream counts once."""

import asyncio
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from bench.learning import AGENTS, Setting, World
from bench.over_bus import FILE
from support.invariants import ClusterState, read_state
from support.kill_schedule import ProcessCluster, schedule
from support.wait import until

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.topology import stream_state
from loom.runner.server.nats_server import NatsServer
from loom.runner.session import check_phases
from loom.schemas.errors import LoomError
from loom.schemas.task import TaskAd

WORLD = World(4004, Setting(tasks=600))
KILLED = ("adapt", "match", "evaluate")
PER_S = 40
WITHIN_S = 120


async def submit(bus: Bus, number: int) -> None:
    domain = f"d{WORLD.domain(number)}"
    ad = TaskAd(task_id=f"t{number}", domain=domain, description="x", estimated_complexity=0.3, timeout_s=600)
    await (await task_client.publish(bus, ad, deltas=False)).close()


async def submit_all(bus: Bus) -> None:
    for number in range(WORLD.setting.tasks):
        await submit(bus, number)
        await asyncio.sleep(1 / PER_S)


async def laid_out(bus: Bus) -> bool:
    try:
        await stream_state(bus, "DEAD")
        await check_phases(bus)  # tasks that wait for the phases would be awarded all at once, without evidence
    except LoomError:
        return False
    return True


async def settled(bus: Bus) -> ClusterState | None:
    """Return the state once every task has ended and every reward is applied."""
    if any([(await stream_state(bus, name))["messages"] for name in ("INTAKE", "TASKS")]):
        return None
    state = await read_state(bus)
    ended = sum(record.ended for record in state.records.values())
    return state if ended == WORLD.setting.tasks and state.rebuilt_profiles() == state.profiles else None


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2])
async def test_profiles_equal_a_rebuild_while_adapt_match_and_evaluate_are_killed(seed: int, tmp_path: Path) -> None:
    server = NatsServer(tmp_path / "store")
    server.start()
    phases = {**{name: [name] for name in KILLED}, "second adapt": ["adapt"], "rest": ["sense", "scale", "execute"]}
    world = {"seed": WORLD.seed, "agents": list(range(AGENTS)), "setting": asdict(WORLD.setting)}
    env = {"LEARNING_WORLD": json.dumps(world), "LOOM_MAX_ATTEMPTS": "1", "TEST_ACK_WAIT_S": "3"}
    try:
        async with (
            Bus(server.url) as bus,
            ProcessCluster(server, tmp_path, phases, ["agents"], FILE, {**env, "LOOM_LOG_LEVEL": "info"}) as cluster,
        ):
            await until(lambda: laid_out(bus), within_s=30, what="the streams are there")
            async with asyncio.TaskGroup() as group:
                group.create_task(submit_all(bus))
                group.create_task(
                    cluster.run_schedule(schedule(seed, (*KILLED, "second adapt"), kills=12, every_s=1.0))
                )
            state = await until(lambda: settled(bus), within_s=WITHIN_S, what="profiles equal a rebuild")
    finally:
        await asyncio.to_thread(server.stop)

    assert state is not None
    assert cluster.killed.total() == 12
    check(state)


def check(state: ClusterState) -> None:
    earned = {reward.reward_id: reward for _, reward in state.rewards}
    assert len(earned) == WORLD.setting.tasks, "each task has one attempt, and that one reward"
    assert all(earned[reward.reward_id].score == reward.score for _, reward in state.rewards), "judged in two ways"
    had = Counter((reward.node_id, reward.domain_token) for reward in earned.values())
    forgotten = []
    for profile in state.profiles.values():
        node_id = profile.node_id
        assert profile.total_tasks <= sum(count for (name, _), count in had.items() if name == node_id)
        for domain_token, evidence in profile.domains.items():
            assert len({score.attempt_id for score in evidence.scores}) == evidence.count <= had[node_id, domain_token]
            forgotten += [(node_id, domain_token)] if evidence.count < had[node_id, domain_token] else []
    assert forgotten, "no node was found changed, though specialists have dropped"
