"""Rewards as EVALUATE publishes them."""

import asyncio
from typing import Any

from loom.bus.rewards import RewardBus
from loom.schemas.learning import Reward
from support.phase_harness import Stage


def reward(n: int, node: str = "n1", score: float = 1.0, **facts: Any) -> Reward:
    """Return what the rules say of the first attempt at task `t<n>`, which ended at second `n`."""
    wanted: dict[str, Any] = {"domain_token": "code", "tokens": 10, "seconds": 0.5, **facts}
    return Reward(
        reward_id=f"t{n}:1:rules", task_id=f"t{n}", attempt=1, node_id=node, score=score, ended_at=float(n), **wanted
    )


async def publish(stage: Stage, *rewards: Reward) -> None:
    """Put rewards on the bus, all at once."""
    bus = RewardBus(bus=stage.bus)
    await asyncio.gather(*(bus.publish(one) for one in rewards))
