import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.phases.match.award_policies import POLICIES, BidderStats, Trust, UnknownAwardPolicy, load_policy


def known(**facts: Any) -> BidderStats:
    return BidderStats(
        **{
            "task_id": "t",
            "attempt": 1,
            "node_id": "n",
            "self_rating": 0.5,
            "mean_reward": 0.0,
            "reward_count": 0,
            "domain_reward_count": 0,
            **facts,
        }
    )


anything = st.builds(
    BidderStats,
    task_id=st.text(max_size=8),
    attempt=st.integers(1, 9),
    node_id=st.text(max_size=8),
    self_rating=st.floats(0, 1),
    mean_reward=st.floats(0, 1),
    reward_count=st.integers(0, 120),
    domain_reward_count=st.integers(0, 5000),
    pending_count=st.integers(0, 50),
    exploration=st.floats(0, 2),
)


@given(st.sampled_from(sorted(POLICIES)), anything)
def test_every_policy_is_a_pure_function_to_a_finite_trust(name: str, facts: BidderStats) -> None:
    trust = load_policy(name)(facts)

    assert trust == load_policy(name)(facts)
    assert math.isfinite(trust.value)
    assert trust.value >= 0
    assert trust.bonus >= 0


def test_nodes_with_little_evidence_get_a_bonus_that_shrinks_with_evidence_and_pending_awards() -> None:
    bonuses = [
        load_policy("ucb")(known(domain_reward_count=100, **facts)).bonus
        for facts in ({}, {"pending_count": 3}, {"reward_count": 20})
    ]

    assert bonuses == sorted(bonuses, reverse=True)
    assert bonuses[0] == pytest.approx(0.3 * math.sqrt(math.log(101) / 2))


def test_greedy_trusts_the_mean_alone() -> None:
    assert load_policy("greedy")(
        known(mean_reward=1.0, reward_count=8, self_rating=0.0, domain_reward_count=100)
    ) == Trust(0.8)


def test_thompson_samples_around_the_evidence() -> None:
    draws = [
        load_policy("thompson")(known(task_id=str(n), mean_reward=0.8, reward_count=100)).value for n in range(400)
    ]

    assert sum(draws) / len(draws) == pytest.approx(0.794, abs=0.01)
    assert len(set(draws)) == len(draws)


def test_round_robin_takes_turns() -> None:
    had: Counter[str] = Counter()
    for _ in range(30):
        trusts = {name: load_policy("round_robin")(known(node_id=name, reward_count=had[name])).value for name in "abc"}
        had[max(trusts, key=lambda name: trusts[name])] += 1

    assert set(had.values()) == {10}


def test_random_is_fair() -> None:
    wins = Counter(
        max("abc", key=lambda name: load_policy("random")(known(task_id=str(task), node_id=name)).value)
        for task in range(900)
    )

    assert all(250 < won < 350 for won in wins.values())


def test_a_custom_policy_is_named_by_module_and_function() -> None:
    assert load_policy("loom.phases.match.award_policies:greedy") is POLICIES["greedy"]


@pytest.mark.parametrize("name", ["best", "no.such:thing", "math:nothing", ":", "math"])
def test_an_unknown_policy_is_refused_with_the_available_ones(name: str) -> None:
    with pytest.raises(UnknownAwardPolicy, match=r"glr_ucb.*module:function"):
        load_policy(name)
