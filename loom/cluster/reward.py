"""The reward bus, by the import path of loom-agent 0.6."""

from loom.bus.reward_bus import RewardBus

__all__ = ["RewardBus"]
