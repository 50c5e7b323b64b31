"""Detects when a node's work in a domain has changed: a generalised likelihood ratio test over its window. Pure."""

import math
from collections.abc import Sequence
from itertools import accumulate

TEST_EVERY = 8
"""Rewards of a node in a domain per test of all splits, which costs more than all else that a reward causes."""
RECENT = 10
"""Most scores after a split that is tested with every reward, so that an abrupt change is found at once."""
MIN_SCORES = 8
"""Scores in the window below which no change is reported."""
MIN_BEFORE = 4
MIN_AFTER = 3
THRESHOLD = 12.0


def change_point(scores: Sequence[float]) -> int | None:
    """Return the number of scores before the most likely change; None without a change.

    It is the split i that maximises i·kl(m1, m) + (n - i)·kl(m2, m). kl is that of Bernoulli variables; m1, m2 and m
    are the means before the split, after it, and of all scores. The maximum must exceed 12. Source: the GLR test of
    Besson et al. (JMLR 2022).

    Args:
        scores: In [0, 1], oldest first.
    """
    total = len(scores)
    if total < MIN_SCORES:
        return None
    sums = list(accumulate(scores))
    whole = likelihood(sums[-1], total)
    if -whole <= THRESHOLD:
        return None  # no split can exceed this value
    highest, change = THRESHOLD, None
    for before in range(MIN_BEFORE, total - MIN_AFTER + 1):
        left = sums[before - 1]
        evidence = likelihood(left, before) + likelihood(sums[-1] - left, total - before) - whole
        if evidence > highest:
            highest, change = evidence, before
    return change


def recent_change_point(scores: Sequence[float]) -> int | None:
    """Return what `change_point` returns, but consider only splits with at most ten scores after them.

    The cost does not depend on the number of scores, except for their sum.

    Args:
        scores: In [0, 1], oldest first.
    """
    total = len(scores)
    if total < MIN_SCORES:
        return None
    wins = sum(scores)
    whole = likelihood(wins, total)
    if -whole <= THRESHOLD:
        return None  # no split can exceed this value
    highest, change = THRESHOLD, None
    right = sum(scores[1 - MIN_AFTER :])
    for after in range(MIN_AFTER, min(RECENT, total - MIN_BEFORE) + 1):
        right += scores[-after]
        evidence = likelihood(wins - right, total - after) + likelihood(right, after) - whole
        if evidence > highest:
            highest, change = evidence, total - after
    return change


def likelihood(wins: float, total: float) -> float:
    """Return the maximum log-likelihood of `wins` in `total` Bernoulli trials, at most 0.

    The sum for two parts minus that of the whole is i·kl(m1, m) + (n - i)·kl(m2, m), as the cross terms cancel.
    """
    share = wins / total  # 0 for the smallest positive numbers, too
    if share <= 0 or share >= 1:
        return 0.0
    return wins * math.log(share) + (total - wins) * math.log1p(-share)
