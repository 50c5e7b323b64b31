import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.phases.adapt.change import LEAST_AFTER, LEAST_BEFORE, changed_at, kl

scores = st.lists(st.floats(0, 1), max_size=120)
UNIT = st.floats(0.001, 0.999)


def test_a_silent_drop_is_found_where_it_was() -> None:
    assert changed_at([1.0] * 60 + [0.0] * 8) == 60


def test_a_drop_in_the_middle_of_noise_is_found_near_where_it_was() -> None:
    at = changed_at(([1.0] * 9 + [0.0]) * 6 + ([0.0] * 9 + [1.0]) * 2)
    assert at is not None
    assert abs(at - 60) <= 3


@pytest.mark.parametrize("window", [[1.0] * 120, [0.0] * 120, [0.5] * 120, [1.0, 0.0] * 60, [1.0] * 4 + [0.0] * 3, []])
def test_where_nothing_has_changed_nothing_is_found(window: list[float]) -> None:
    assert changed_at(window) is None


@given(scores)
def test_a_change_leaves_enough_on_both_sides(window: list[float]) -> None:
    at = changed_at(window)
    assert at is None or LEAST_BEFORE <= at <= len(window) - LEAST_AFTER


@given(scores)
def test_better_and_worse_are_treated_alike(window: list[float]) -> None:
    turned = changed_at([1 - score for score in window])
    assert (turned is None) == (changed_at(window) is None)


@given(UNIT, UNIT)
def test_the_divergence_is_nought_only_of_the_same(p: float, q: float) -> None:
    assert kl(p, q) >= -1e-12
    assert kl(p, p) == pytest.approx(0)
