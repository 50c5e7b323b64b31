"""ClusterManager, by the import path of loom-agent 0.6."""

from loom.compat.cluster_manager import ClusterManager, InvalidNode

__all__ = ["ClusterManager", "InvalidNode"]
