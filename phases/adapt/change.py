"""When a node's work in a domain has changed: a generalised likelihood ratio test over its window. Pure."""

import math
from collections.abc import Sequence
from itertools import accumulate

LEAST = 8
"""Scores below which nothing is said."""
LEAST_BEFORE = 4
LEAST_AFTER = 3
THRESHOLD = 12.0
_EDGE = 1e-9
"""Keeps means of 0 and 1 away from logarithms of nothing."""


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
    mean = sums[-1] / total
    best, at = THRESHOLD, None
    for before in range(LEAST_BEFORE, total - LEAST_AFTER + 1):
        left, after = sums[before - 1], total - before
        evidence = before * kl(left / before, mean) + after * kl((sums[-1] - left) / after, mean)
        if evidence > best:
            best, at = evidence, before
    return at


def kl(p: float, q: float) -> float:
    """Return the Kullback-Leibler divergence between Bernoulli variables of means `p` and `q`."""
    p, q = (min(max(each, _EDGE), 1 - _EDGE) for each in (p, q))
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
