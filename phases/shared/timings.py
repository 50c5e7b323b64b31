"""The times of acceptance checks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckTimings:
    """Limits of a check's wait and of its helper process, in seconds."""

    wait_s: float = 2.0
    """Time that a check may wait for its turn in each lane."""
    stuck_s: float = 30.0
    """Wall-clock time after which a helper counts as stuck: load alone does not explain it."""
    restart_s: float = 1.0
    """Pause after a helper that failed to start."""
