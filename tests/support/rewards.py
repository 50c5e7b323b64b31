"""Rewards as EVALUATE publishes them."""

import asyncio

from loom.bus.rewards import RewardBus
from loom.schemas.learning.reward import Reward
from support.phase_harness import Stage


async def publish(stage: Stage, *rewards: Reward) -> None:
    """Put rewards on the bus, all at once."""
    bus = RewardBus(bus=stage.bus)
    await asyncio.gather(*(bus.publish(one) for one in rewards))
