"""The times of EVALUATE."""

from dataclasses import dataclass

from loom.phases.shared.timings import CheckTimings


@dataclass(frozen=True)
class EvaluateTimings:
    """Pauses of EVALUATE, in seconds."""

    check_again_s: float = 1.0
    """Pause before a result that could not be checked is consumed again."""
    checks: CheckTimings = CheckTimings()
    """Limits of acceptance checks."""
