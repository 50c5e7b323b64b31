import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.phases.adapt.change_detection import MIN_AFTER, MIN_BEFORE, change_point, likelihood, recent_change_point

scores = st.lists(st.floats(0, 1), max_size=120)


def test_a_silent_drop_is_found_where_it_was() -> None:
    assert change_point([1.0] * 60 + [0.0] * 8) == 60


def test_a_drop_in_the_middle_of_noise_is_found_near_where_it_was() -> None:
    at = change_point(([1.0] * 9 + [0.0]) * 6 + ([0.0] * 9 + [1.0]) * 2)
    assert at is not None
    assert abs(at - 60) <= 3


@pytest.mark.parametrize("window", [[1.0] * 120, [0.0] * 120, [0.5] * 120, [1.0, 0.0] * 60, [1.0] * 4 + [0.0] * 3, []])
def test_without_a_change_no_change_is_detected(window: list[float]) -> None:
    assert change_point(window) is None


@pytest.mark.parametrize("score", [5e-324, 1e-300, 1e-17, 1 - 1e-16])
def test_scores_next_to_0_and_1_are_compared_like_others(score: float) -> None:
    for test in (change_point, recent_change_point):
        test([score] * 9)
        test([score] + [0.0] * 20)
        assert test([score] * 60 + [1.0 - round(score)] * 8) == 60


@given(scores)
def test_a_change_leaves_enough_on_both_sides(window: list[float]) -> None:
    at = change_point(window)
    assert at is None or MIN_BEFORE <= at <= len(window) - MIN_AFTER


@given(scores)
def test_better_and_worse_are_treated_alike(window: list[float]) -> None:
    turned = change_point([1 - score for score in window])
    assert (turned is None) == (change_point(window) is None)


@given(scores)
def test_the_gain_of_a_split_is_the_divergence_of_its_parts_from_the_whole(window: list[float]) -> None:
    """i·kl(m1, m) + (n - i)·kl(m2, m), as in the docs."""
    n, total = len(window), sum(window)
    for i in range(1, n):
        left = sum(window[:i])
        found = likelihood(left, i) + likelihood(total - left, n - i) - likelihood(total, n)
        divergence = i * kl(left / i, total / n) + (n - i) * kl((total - left) / (n - i), total / n)
        assert found == pytest.approx(divergence, abs=1e-5)


def kl(p: float, q: float) -> float:
    """Kullback-Leibler divergence of Bernoulli variables."""
    p, q = (min(max(each, 1e-12), 1 - 1e-12) for each in (p, q))
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
