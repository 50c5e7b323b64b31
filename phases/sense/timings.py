"""The times of SENSE."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SenseTimings:
    """Limits of SENSE, in seconds."""

    estimate_within_s: float = 10.0
    """Limit of a model's estimate; then the heuristic is used."""
    stranded_after_s: float = 1.0
    """Time after its deadline from which a task without messages counts as stranded."""
