"""The classes that work without a bus, by the import path of loom-agent 0.6.

TaskPlanner comes from its own module: asyncio and logs load slowly.
"""

from loom.compat.cluster_manager import ClusterManager, InvalidNode
from loom.compat.lifecycle import ApoptosisRejected, LifecycleManager, MitosisError
from loom.compat.skill_registry import SkillNodeRegistry

__all__ = [
    "ApoptosisRejected",
    "ClusterManager",
    "InvalidNode",
    "LifecycleManager",
    "MitosisError",
    "SkillNodeRegistry",
]
