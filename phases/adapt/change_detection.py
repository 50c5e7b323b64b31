"""When a node's work in a domain has changed: a generalised likelihood ratio test over its window. Pure."""

import math
from collections.abc import Sequence
from itertools import accumulate

LEAST = 8
"""Scores below which nothing is said."""
LEAST_BEFORE = 4
LEAST_AFTER = 3
THRESHOLD = 12.0


def changed_at(scores: Sequence[float]) -> int | None:
    """Return how many scores came before the most likely change; None when there was none.

    The split i that maximises i·kl(m1, m) + (n - i)·kl(m2, m), with kl of Bernoulli variables and m1, m2, m the
    means before it, after it and of all, after the GLR test of Besson et al. (JMLR 2022). It counts above 12.

    Args:
        scores: In [0, 1], oldest first.
    """
    total = len(scores)
    if total < LEAST:
        return None
    sums = list(accumulate(scores))
    alone = likelihood(sums[-1], total)
    if -alone <= THRESHOLD:
        return None  # no split explains more than all there is to explain
    best, at = THRESHOLD, None
    for before in range(LEAST_BEFORE, total - LEAST_AFTER + 1):
        left = sums[before - 1]
        evidence = likelihood(left, before) + likelihood(sums[-1] - left, total - before) - alone
        if evidence > best:
            best, at = evidence, before
    return at


def likelihood(wins: float, total: float) -> float:
    """Return the greatest log-likelihood of so many wins of Bernoulli trials, at most 0.

    Two parts' together, less that of the whole, is i·kl(m1, m) + (n - i)·kl(m2, m): their cross terms add up to it.
    """
    losses = total - wins
    if wins <= 0 or losses <= 0:
        return 0.0
    return wins * math.log(wins / total) + losses * math.log(losses / total)
