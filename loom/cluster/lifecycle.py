"""The lifecycle of nodes, by the import path of loom-agent 0.6."""

from loom.compat.lifecycle import ApoptosisRejected, LifecycleManager, MitosisError

__all__ = ["ApoptosisRejected", "LifecycleManager", "MitosisError"]
