import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.compat.reward_formulas import RewardBus
from loom.schemas.learning.profile import WINDOW
from loom.types import AgentNode, CapabilityProfile, RewardSignal, TaskAd

CODE = TaskAd(task_id="t", domain="code", description="x", token_budget=1000)
DAY = 86_400.0
bus = RewardBus()


def node(**scores: float) -> AgentNode:
    return AgentNode(id="n", capabilities=CapabilityProfile(scores=dict(scores)))


def budgeted(token_budget: int | None) -> TaskAd:
    return TaskAd(description="x", token_budget=token_budget)


def aged(score: float, days: float, *, half_life_days: float = 30) -> float:
    old = node(code=score)
    old.remember(task_id="t", domain="code", reward=1, token_cost=0, at=DAY)
    RewardBus(half_life_days=half_life_days).decay(old, now=DAY + days * DAY)
    return old.capabilities.scores["code"]


def test_a_success_earns_by_quality_efficiency_and_reliability() -> None:
    signal = bus.compute_signal(budgeted(1000), success=True, token_cost=250, error_count=0)

    assert (signal.quality, signal.efficiency, signal.reliability) == (0.7, 0.75, 1.0)
    assert signal.total == pytest.approx(0.5 * 0.7 + 0.3 * 0.75 + 0.2)
    assert bus.compute_signal(budgeted(1000), success=True, token_cost=0, error_count=0).total == pytest.approx(0.85)
    assert bus.compute_signal(budgeted(1000), success=True, token_cost=0, error_count=1).reliability == 0


def test_without_a_budget_efficiency_is_measured_by_the_yardstick() -> None:
    assert bus.compute_signal(budgeted(None), success=True, token_cost=1024, error_count=0).efficiency == 0.75


def test_overspending_earns_no_efficiency_and_a_budget_of_zero_divides_nothing() -> None:
    assert bus.compute_signal(budgeted(1000), success=True, token_cost=5000, error_count=0).efficiency == 0
    assert bus.compute_signal(budgeted(0), success=True, token_cost=5, error_count=0).efficiency == 0


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 3))
def test_a_failure_earns_nothing_however_fast(cost: int, budget: int, errors: int) -> None:
    signal = bus.compute_signal(budgeted(budget), success=False, token_cost=cost, error_count=errors)

    assert bus.compute_reward(signal) == signal.total == 0


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 3))
def test_a_success_earns_more_than_any_failure_and_at_most_85(cost: int, budget: int, errors: int) -> None:
    signal = bus.compute_signal(budgeted(budget), success=True, token_cost=cost, error_count=errors)

    assert 0.35 <= signal.total <= 0.85 + 1e-9
    assert bus.compute_reward(signal) == signal.total


def test_the_signal_of_the_old_library_has_the_same_sum() -> None:
    assert bus.compute_reward(RewardSignal(quality=1, efficiency=0.5, reliability=1)) == pytest.approx(0.85)


def test_a_run_changes_scores_rates_counters_and_history() -> None:
    learner = node(Code=0.9)

    reward = bus.evaluate(learner, CODE, success=True, token_cost=500, now=7.0)

    facts = learner.capabilities
    assert reward == pytest.approx(0.7)
    assert facts.scores == {"Code": pytest.approx(0.3 * 0.7 + 0.7 * 0.9)}
    assert facts.success_rate == pytest.approx(0.3 + 0.7 * 0.5)
    assert facts.total_tasks == 1
    assert learner.last_active_at == 7.0
    (record,) = learner.reward_history
    assert (record.task_id, record.reward, record.domain) == ("t", reward, "Code")
    assert (record.token_cost, record.timestamp) == (500, 7.0)


def test_a_domain_seen_for_the_first_time_starts_at_the_prior() -> None:
    learner = node()
    bus.evaluate(learner, CODE, success=False)
    bus.evaluate(learner, TaskAd(description="x"), success=False)

    assert learner.capabilities.scores == {"code": pytest.approx(0.35), "general": pytest.approx(0.35)}
    assert learner.capabilities.success_rate == pytest.approx(0.5 * 0.7 * 0.7)


def test_a_loss_counts_once_and_a_success_ends_the_row() -> None:
    learner = node()
    for expected in (1, 2, 3):
        bus.evaluate(learner, CODE, success=False)
        assert learner.consecutive_losses == expected

    bus.evaluate(learner, CODE, success=True, token_cost=10_000, error_count=1)

    assert learner.consecutive_losses == 0
    assert learner.capabilities.total_tasks == 4


def test_history_is_bounded() -> None:
    learner = node()
    for i in range(WINDOW + 10):
        bus.evaluate(learner, CODE, success=True, now=float(i))

    assert len(learner.reward_history) == WINDOW
    assert learner.reward_history[-1].timestamp == WINDOW + 9
    assert learner.capabilities.total_tasks == WINDOW + 10


@given(st.lists(st.booleans(), max_size=50), st.floats(0, 1))
def test_scores_and_rates_stay_between_0_and_1(outcomes: list[bool], start: float) -> None:
    learner = node(code=start)
    for success in outcomes:
        bus.evaluate(learner, CODE, success=success)

    assert 0 <= learner.capabilities.scores["code"] <= 1
    assert 0 <= learner.capabilities.success_rate <= 1


def test_alpha_is_the_weight_of_the_newest() -> None:
    learner = node(code=0.0)
    RewardBus(alpha=1).evaluate(learner, CODE, success=True)

    assert learner.capabilities.scores["code"] == pytest.approx(0.85)


def test_scores_fade_by_half_the_way_to_the_prior_per_half_life() -> None:
    assert aged(0.9, 30) == pytest.approx(0.7)
    assert aged(0.9, 60) == pytest.approx(0.6)
    assert aged(0.1, 30) == pytest.approx(0.3)
    assert aged(0.9, 7, half_life_days=7) == pytest.approx(0.7)


def test_the_decay_of_a_day_is_small_and_continuous() -> None:
    assert aged(0.9, 1.01) > 0.88
    assert aged(0.9, 0.99) - aged(0.9, 1.01) < 0.001


@given(st.floats(0, 1), st.floats(0, 10_000), st.floats(0, 10_000))
def test_fading_moves_towards_the_prior_and_never_past_it(score: float, days: float, more: float) -> None:
    earlier, later = aged(score, days), aged(score, days + more)

    assert abs(later - 0.5) <= abs(earlier - 0.5) + 1e-12
    assert abs(earlier - 0.5) <= abs(score - 0.5) + 1e-12
    assert (earlier - 0.5) * (score - 0.5) >= 0


@given(st.lists(st.floats(0, 100), min_size=1, max_size=5))
def test_the_number_of_decay_calls_makes_no_difference(days: list[float]) -> None:
    often = node(code=0.9)
    often.remember(task_id="t", domain="code", reward=1, token_cost=0, at=DAY)
    for day in sorted(days):
        bus.decay(often, now=DAY + day * DAY)
    bus.decay(often, now=0)

    assert often.capabilities.scores["code"] == pytest.approx(aged(0.9, max(days)))


def test_a_claim_without_any_reward_does_not_fade() -> None:
    claimed = node(code=0.9, data=0.8)
    claimed.remember(task_id="t", domain="CODE", reward=1, token_cost=0, at=0)
    bus.decay(claimed, now=30 * DAY)

    assert claimed.capabilities.scores == {"code": pytest.approx(0.7), "data": 0.8}


@pytest.mark.parametrize("bad", [{"alpha": -0.1}, {"alpha": 1.1}, {"half_life_days": 0}])
def test_settings_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        RewardBus(**bad)
