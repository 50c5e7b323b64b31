"""The times of ADAPT."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdaptTimings:
    """Intervals of ADAPT, in seconds."""

    batch_s: float = 0.02
    """Time for which rewards are collected before profiles are written."""
    standby_s: float = 1.0
    """Time for which a replica leaves its writes to the active one."""
    sweep_s: float = 1.0
    """Interval between two searches for nodes to retire."""
    lease_s: float = 15.0
    """Validity of a lease: longer than a host takes to announce what has changed."""
    snapshot_retry_s: float = 30.0
    """Pause after a round of snapshots. It is longer than a lease, so that the replica that began one has finished."""
