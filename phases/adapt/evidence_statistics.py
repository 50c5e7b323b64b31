"""Statistics of the evidence about a node in one domain. Pure."""

from math import sqrt

from loom.schemas.learning.profile import WINDOW, DomainEvidence

RECENT_SCORES = 10
"""Number of the newest scores that the trend compares with the mean of the window."""
Z_95 = 1.96
"""Quantile of the normal distribution for an interval of 95 %."""
ADDED_TRIALS = 4
"""Trials, half of them successes, that the method of Agresti and Coull adds to the observed ones."""


def mean_reward(evidence: DomainEvidence) -> float | None:
    """Return the mean reward, 0 to 1; None without rewards."""
    return evidence.mean if evidence.count else None


def margin_of_error(evidence: DomainEvidence) -> float | None:
    """Return half the width of the 95 % interval of the mean reward; None without rewards.

    Rewards count as successes and failures. The interval is that of Agresti and Coull (1998): it adds two successes and
    two failures, so that few equal rewards do not look certain.
    """
    if not evidence.count:
        return None
    trials = evidence.count + ADDED_TRIALS
    mean = (evidence.mean * evidence.count + ADDED_TRIALS / 2) / trials
    return Z_95 * sqrt(mean * (1 - mean) / trials)


def trend(evidence: DomainEvidence) -> float | None:
    """Return the mean of the newest `RECENT_SCORES` scores less the mean of the window; None without scores."""
    newest = [score.score for score in evidence.scores[-RECENT_SCORES:]]
    return sum(newest) / len(newest) - evidence.mean if newest else None


def changed_at(evidence: DomainEvidence) -> float | None:
    """Return the server time at which the node changed, so that earlier scores were dropped.

    Returns:
        Seconds since the epoch; None without a change, and once the window has been filled since.
    """
    return evidence.since if evidence.since and evidence.count < WINDOW else None
