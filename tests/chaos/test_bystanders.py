"""Tasks, agents and messages that burden a cluster cost the honest tasks beside them nothing."""

from pathlib import Path

import pytest
from support.bystanders import account

SECONDS = 8


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_honest_tasks_succeed_at_once_beside_every_burden(tmp_path: Path) -> None:
    await account(tmp_path, SECONDS)
