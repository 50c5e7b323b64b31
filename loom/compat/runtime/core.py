"""The Runtime, by the import path of loom-agent 0.6: `loom.runtime.core`."""

from loom.runtime import Runtime

__all__ = ["Runtime"]
