"""The seed's classes that work without a bus. TaskPlanner comes from its own module: asyncio and logs load slowly."""

from loom.cluster.lifecycle import ApoptosisRejected, LifecycleManager, MitosisError
from loom.cluster.manager import ClusterManager, InvalidNode
from loom.cluster.skill_registry import SkillNodeRegistry

__all__ = [
    "ApoptosisRejected",
    "ClusterManager",
    "InvalidNode",
    "LifecycleManager",
    "MitosisError",
    "SkillNodeRegistry",
]
