"""Tasks, agents and messages that burden a cluster cost the honest tasks nothing."""

from pathlib import Path

import pytest
from support.bystanders import measure_and_check

SECONDS = 8


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_honest_tasks_succeed_at_once_under_every_burden(tmp_path: Path) -> None:
    await measure_and_check(tmp_path, SECONDS)
