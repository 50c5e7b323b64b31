"""The times of SCALE."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScaleTimings:
    """Intervals of SCALE, in seconds."""

    spawn_interval_s: float = 1.0
    """Interval between two requests for a node: a node needs about this long to start and to bid."""
