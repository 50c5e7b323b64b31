"""The times of EVALUATE that an operator or a test may set."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluateTimings:
    """Pauses of EVALUATE, in seconds."""

    check_again_s: float = 1.0
    """Pause before a result that could not be checked is consumed again."""
