"""The reward bus, by the import path of loom-agent 0.6."""

from loom.bus.rewards import RewardBus

__all__ = ["RewardBus"]
