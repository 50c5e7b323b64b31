"""TaskPlanner, by the import path of loom-agent 0.6."""

from loom.compat.planner import TaskPlanner

__all__ = ["TaskPlanner"]
