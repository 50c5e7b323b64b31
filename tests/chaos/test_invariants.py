"""A cluster of processes under kills: every accepted task ends exactly once."""

from pathlib import Path

import pytest
from support.kill_run import run_under_kills
from support.kill_schedule import LONGEST_DOWN_S, schedule


def test_a_schedule_is_the_same_for_the_same_random_seed() -> None:
    targets = ["server", "sense", "ada"]

    assert list(schedule(3, targets, 20, 1.0)) == list(schedule(3, targets, 20, 1.0))
    assert list(schedule(3, targets, 20, 1.0)) != list(schedule(4, targets, 20, 1.0))
    assert {kill.target for kill in schedule(3, targets, 60, 1.0)} == set(targets)
    assert all(0 <= kill.down_s <= LONGEST_DOWN_S for kill in schedule(3, targets, 60, 1.0))


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_every_accepted_task_ends_once_under_random_kills(tmp_path: Path) -> None:
    await run_under_kills(tmp_path, count=150, per_s=20, kills=9, every_s=0.8, seed=4, ack_wait_s=3)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_every_task_of_a_mixed_workload_ends_once_under_kills_and_stops(tmp_path: Path) -> None:
    """The workload also cancels, delegates and divides tasks."""
    await run_under_kills(tmp_path, count=100, per_s=15, kills=9, every_s=0.8, seed=11, ack_wait_s=3, mixed=True)


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_every_divided_task_ends_once_and_no_subtask_runs_twice_under_kills(tmp_path: Path) -> None:
    report = await run_under_kills(tmp_path, count=12, per_s=2, kills=8, every_s=0.8, seed=7, ack_wait_s=3, parts=8)

    assert "overhead" in report
