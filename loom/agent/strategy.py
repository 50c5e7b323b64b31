"""The context of a loop, by the import path of loom-agent 0.6."""

from loom.compat.loop_context import LoopContext

__all__ = ["LoopContext"]
