"""AmoebaLoop, by the import path of loom-agent 0.6."""

from loom.compat.amoeba_loop import AmoebaLoop

__all__ = ["AmoebaLoop"]
