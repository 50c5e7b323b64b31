import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.phases.adapt.fold import fold
from loom.runner.cli.nodes import changed_at, health_of, trend, uncertainty
from loom.schemas.config import ClusterConfig
from loom.schemas.learning import DomainEvidence, NodeProfile, Reward


def folded(*scores: float) -> NodeProfile:
    profile = NodeProfile(node_id="n")
    for seq, score in enumerate(scores, start=1):
        one = Reward(
            reward_id=f"t{seq}:1:rules",
            task_id=f"t{seq}",
            attempt=1,
            node_id="n",
            slug="code",
            score=score,
            ended_at=1000.0 + seq,
        )
        profile = fold(profile, one, seq, forget=True)
    return profile


@given(st.floats(0, 1), st.integers(1, 119))
def test_more_of_the_same_is_less_uncertain_and_never_certain(mean: float, count: int) -> None:
    less, more = (uncertainty(DomainEvidence(count=n, mean=mean)) for n in (count, count + 1))
    assert more > 0
    assert more < less or mean not in {0.0, 1.0}


def test_an_interval_is_as_wide_as_trials_are_few() -> None:
    assert uncertainty(DomainEvidence(count=96, mean=0.5)) == pytest.approx(0.098)


def test_the_trend_is_that_of_the_newest_ten() -> None:
    assert trend(folded(*[0.5] * 10, *[0.6] * 10).domains["code"]) == pytest.approx(0.05)
    assert trend(folded(1.0).domains["code"]) == 0


def test_a_change_is_told_until_the_window_has_filled_up_again() -> None:
    good = [1.0] * 60
    steady, fallen = folded(*good).domains["code"], folded(*good, *[0.0] * 12).domains["code"]
    assert changed_at(steady) is None
    assert changed_at(fallen) == pytest.approx(1060, abs=4)
    assert changed_at(folded(*good * 3).domains["code"]) is None


def test_a_node_without_history_is_healthy() -> None:
    assert health_of(None, ClusterConfig()) == health_of(folded(0.0), ClusterConfig()) == "healthy"
    assert health_of(folded(*[0.0] * 10), ClusterConfig()) == "dying"
