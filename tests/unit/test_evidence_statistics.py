import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import reward

from loom.phases.adapt.evidence import apply_reward
from loom.phases.adapt.evidence_statistics import changed_at, margin_of_error, mean_reward, trend
from loom.schemas.learning.profile import DomainEvidence, NodeProfile


def evidence(*scores: float) -> DomainEvidence:
    """Return the evidence after rewards with these scores, one a second."""
    profile = NodeProfile(node_id="n1")
    for seq, score in enumerate(scores, start=1):
        profile = apply_reward(profile, reward(seq, score=score), seq, forget=True)
    return profile.domains["code"]


@given(st.floats(0, 1), st.integers(1, 119))
def test_more_equal_rewards_are_less_uncertain_and_never_certain(mean: float, count: int) -> None:
    less, more = (margin_of_error(DomainEvidence(count=n, mean=mean)) for n in (count, count + 1))
    assert less is not None
    assert more is not None
    assert more > 0
    assert more < less or mean not in {0.0, 1.0}


def test_the_margin_of_error_is_that_of_agresti_and_coull() -> None:
    assert margin_of_error(DomainEvidence(count=96, mean=0.5)) == pytest.approx(0.098)


def test_the_trend_is_that_of_the_newest_ten() -> None:
    assert trend(evidence(*[0.5] * 10, *[0.6] * 10)) == pytest.approx(0.05)
    assert trend(evidence(1.0)) == 0


def test_without_evidence_there_is_neither_mean_nor_margin_nor_trend() -> None:
    none = DomainEvidence()
    assert (mean_reward(none), margin_of_error(none), trend(none)) == (None, None, None)


def test_a_change_is_shown_until_the_window_has_been_filled_again() -> None:
    good = [1.0] * 60
    assert changed_at(evidence(*good)) is None
    assert changed_at(evidence(*good, *[0.0] * 12)) == pytest.approx(60, abs=4)
    assert changed_at(evidence(*good * 3)) is None
