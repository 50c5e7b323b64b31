"""The reward bus, by the import path of loom-agent 0.6."""

from loom.compat.reward_formulas import RewardBus

__all__ = ["RewardBus"]
