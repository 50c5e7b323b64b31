"""Several judges of one attempt, weighed against one another: one task in the profile."""

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loom.phases.adapt.evidence import apply_reward
from loom.phases.adapt.reward_weights import MAX_SOURCES, weights_of
from loom.schemas.base import decode, encode
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import Reward

EMPTY = NodeProfile(node_id="n1")
LONG = "the-security-review-of-the-platform-team"


def reward(source: str, score: float, task: str = "t", **facts: Any) -> Reward:
    wanted: dict[str, Any] = {"reward_id": f"{task}:1:{source}", "ended_at": 1.0, "domain_token": "code", **facts}
    return Reward(task_id=task, attempt=1, source=source, node_id="n1", score=score, **wanted)


def folded(*rewards: Reward, **weights: float) -> NodeProfile:
    return more(EMPTY, *rewards, **weights)


def more(known: NodeProfile, *rewards: Reward, **weights: float) -> NodeProfile:
    for seq, one in enumerate(rewards, start=known.last_seq + 1):
        known = apply_reward(known, one, seq, weights=weights_of(weights))
    return known


def mean(*rewards: Reward, **weights: float) -> float:
    return folded(*rewards, **weights).domains["code"].mean


def test_a_person_overrules_the_rules_by_weight() -> None:
    profile = folded(reward("rules", 1.0), reward("person", 0.0))
    assert (profile.domains["code"].count, profile.domains["code"].mean, profile.total_tasks) == (1, 0.25, 1)
    assert (profile.success_rate, profile.consecutive_losses) == (0.0, 1)
    assert mean(reward("rules", 1.0), reward("linter", 0.0)) == 0.5


def test_weights_are_those_that_are_set_and_a_person_keeps_its_own_unless_it_is_named() -> None:
    words = reward("rules", 1.0), reward("linter", 0.0), reward("person", 0.5)
    assert mean(*words, linter=0.5) == pytest.approx((1 + 0.5 * 0 + 3 * 0.5) / 4.5, abs=1e-6)
    assert mean(*words, person=2, rules=5) == pytest.approx((5 * 1 + 0 + 2 * 0.5) / 8, abs=1e-6)
    assert mean(reward("rules", 1.0), reward(LONG, 0.0), **{LONG: 4}) == 0.2


def test_a_source_replaces_its_own_score_and_no_other() -> None:
    profile = folded(reward("rules", 1.0), reward("person", 0.0), reward("person", 1.0), reward("rules", 0.2))
    assert profile.domains["code"].scores[0].by_source == {"rules": 0.2, "person": 1.0}
    assert profile.domains["code"].mean == pytest.approx((0.2 + 3) / 4)
    assert (profile.total_tasks, profile.domains["code"].count) == (1, 1)


def test_a_word_is_known_by_task_attempt_and_source_whatever_its_id() -> None:
    profile = folded(reward("person", 0.0, reward_id="urn:uuid:1"), reward("person", 1.0, reward_id="elsewhere/2"))
    assert (profile.total_tasks, profile.domains["code"].mean) == (1, 1.0)


def test_the_rules_alone_take_no_room_for_their_name() -> None:
    assert folded(reward("rules", 1 / 3)).domains["code"].scores[0].by_source == {}
    assert folded(reward("rules", 1 / 3)).domains["code"].mean == 1 / 3


def test_a_source_of_weight_zero_is_read_and_not_learned_from() -> None:
    before = folded(reward("rules", 1.0))
    after = apply_reward(before, reward("linter", 0.0), 2, weights=weights_of({"linter": 0}))
    assert after.last_seq == 2
    assert (after.domains, after.total_tasks) == (before.domains, 1)
    alone = folded(reward("rules", 0.0), reward("person", 1.0), rules=0)
    assert (alone.domains["code"].mean, alone.total_tasks, alone.consecutive_losses) == (1.0, 1, 0)


def test_a_score_whose_weight_became_zero_no_longer_counts_after_the_next() -> None:
    before = folded(reward("rules", 1.0), reward("linter", 0.0))
    after = more(before, reward("person", 0.5), rules=0, linter=0)
    assert after.domains["code"].mean == 0.5


def test_an_inheritance_is_not_a_judgement() -> None:
    left = inherited("old", 0.75)
    assert mean(left, adapt=0) == 0.75
    again = folded(left, inherited("old", 0.25))
    assert (again.domains["code"].count, again.domains["code"].mean, again.total_tasks) == (1, 0.25, 0)


def inherited(node: str, score: float) -> Reward:
    return Reward(
        reward_id=f"inherit:{node}", kind="inherit", task_id=node, attempt=0, source="adapt", node_id="n1",
        domain_token="code", score=score, ended_at=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("order", [("rules", "person"), ("person", "rules")])
def test_two_judges_are_never_two_losses(order: tuple[str, str]) -> None:
    profile = folded(*(reward(source, 0.0) for source in order))
    assert (profile.consecutive_losses, profile.total_tasks) == (1, 1)


def test_losses_in_a_row_by_judges_alone_add_up() -> None:
    words = [reward(who, who == "rules", f"t{n}", ended_at=float(n)) for n in range(5) for who in ("rules", "person")]
    assert folded(*words).consecutive_losses == 5


def test_a_loss_that_turns_into_a_win_ends_the_row_where_it_stands() -> None:
    lost = [reward("rules", 0.0, f"t{n}", ended_at=float(n)) for n in range(5)]
    turned = folded(*lost, reward("person", 1.0, "t2", ended_at=9.0))
    assert turned.consecutive_losses == 2
    assert more(turned, reward("person", 0.0, "t2", ended_at=9.0)).consecutive_losses == 5
    assert more(turned, reward("person", 0.1, "t4", ended_at=9.0)).consecutive_losses == 2


def test_the_heaviest_sources_count_when_space_runs_out() -> None:
    crowd = [reward(f"j{n}", 1.0) for n in range(MAX_SOURCES + 3)]
    [entry] = folded(*crowd, reward("person", 0.0)).domains["code"].scores
    assert list(entry.by_source) == ["person", "j0", "j1", "j2"]
    assert entry.score == pytest.approx(3 / 6)
    without_late = folded(*crowd[:MAX_SOURCES])
    assert more(without_late, reward("late", 0.0)).domains == without_late.domains


judges = st.sampled_from(["rules", "person", "linter", LONG])
words = st.lists(st.tuples(st.sampled_from("abcdef"), judges, st.floats(0, 1)), max_size=40)


def rewards_of(history: list[tuple[str, str, float]]) -> list[Reward]:
    return [reward(who, score, task, ended_at=float(ord(task))) for task, who, score in history]


@given(words, st.dictionaries(judges, st.floats(0, 1000), max_size=4))
def test_each_attempt_is_one_entry_within_its_scores(
    history: list[tuple[str, str, float]], setting: dict[str, float]
) -> None:
    weighted = [one for one in history if setting.get(one[1], 1) > 0]
    assume(weighted)
    profile = folded(*rewards_of(history), **setting)
    evidence, last = profile.domains["code"], {(task, who): score for task, who, score in weighted}
    assert evidence.count == profile.total_tasks == len({task for task, *_ in weighted})
    assert 0 <= evidence.mean <= 1
    for entry in evidence.scores:
        scores = [score for (task, _), score in last.items() if entry.attempt_id == f"{task}:1"]
        assert min(scores) - 1e-4 <= entry.score <= max(scores) + 1e-4
    assert profile.consecutive_losses <= evidence.count
    assert decode(encode(profile), NodeProfile) == profile


@given(words, st.integers(0, 40), st.integers(0, 40))
def test_a_redelivered_reward_changes_nothing(history: list[tuple[str, str, float]], cut: int, back: int) -> None:
    rewards = list(enumerate(rewards_of(history), start=1))
    profile, whole = EMPTY, folded(*rewards_of(history))
    for seq, one in [*rewards[:cut], *rewards[max(0, cut - back) :]]:
        profile = apply_reward(profile, one, seq)
    assert profile == whole


@given(words, st.randoms())
def test_windows_do_not_depend_on_which_judge_is_read_first(history: list[tuple[str, str, float]], random: Any) -> None:
    """The scores of each source stay in order."""
    queues: dict[str, list[Reward]] = {}
    for one in rewards_of(history):
        queues.setdefault(one.source, []).append(one)
    mixed = []
    while queues:
        source = random.choice(sorted(queues))
        mixed.append(queues[source].pop(0))
        if not queues[source]:
            del queues[source]
    known, again = folded(*rewards_of(history)), folded(*mixed)
    assert again.domains == known.domains
    assert (again.total_tasks, again.success_rate) == (known.total_tasks, known.success_rate)
