from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.phases.adapt.evidence import apply_reward, change_between, summary
from loom.schemas.base import decode, encode
from loom.schemas.learning.profile import MAX_DOMAINS, WINDOW, NodeProfile
from loom.schemas.learning.reward import Reward

EMPTY = NodeProfile(node_id="n1")


def reward(task: str = "t", score: float = 1.0, ended_at: float = 0.0, **facts: Any) -> Reward:
    wanted: dict[str, Any] = {"reward_id": f"{task}:1:rules", "domain_token": "code", **facts}
    return Reward(task_id=task, attempt=1, node_id="n1", score=score, ended_at=ended_at, **wanted)


def folded(rewards: list[Reward], start: NodeProfile = EMPTY) -> NodeProfile:
    for seq, one in enumerate(rewards, start=start.last_seq + 1):
        start = apply_reward(start, one, seq)
    return start


rewards = st.lists(
    st.builds(
        reward,
        task=st.sampled_from([f"t{i}" for i in range(12)]),
        score=st.floats(0, 1),
        ended_at=st.floats(0, 100),
        domain_token=st.sampled_from(["code", "data"]),
        kind=st.sampled_from(["reward", "inherit"]),
        tokens=st.integers(0, 1000),
        seconds=st.floats(0, 10),
    ),
    max_size=40,
)


@given(rewards)
def test_counts_and_means_are_those_of_the_window(history: list[Reward]) -> None:
    for evidence in folded(history).domains.values():
        scores = [entry.score for entry in evidence.scores]
        assert evidence.count == len(scores) == len({entry.attempt_id for entry in evidence.scores})
        assert evidence.mean == pytest.approx(sum(scores) / len(scores))
        assert all(a.ended_at <= b.ended_at for a, b in pairwise(evidence.scores))


@given(rewards)
def test_a_profile_survives_the_wire(history: list[Reward]) -> None:
    profile = folded(history)
    assert decode(encode(profile), NodeProfile) == profile


@given(rewards, st.integers(0, 40))
def test_folding_in_two_steps_or_again_from_any_point_gives_the_same(history: list[Reward], cut: int) -> None:
    whole = folded(history)
    stored = folded(history[:cut])
    for seq, one in enumerate(history, start=1):  # a restarted replica reads the whole stream again
        stored = apply_reward(stored, one, seq)
    assert stored == whole


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.randoms())
def test_windows_do_not_depend_on_the_order_of_arrival(scores: list[float], random: Any) -> None:
    history = [reward(f"t{i}", score, float(i)) for i, score in enumerate(scores)]
    shuffled = random.sample(history, len(history))
    assert folded(shuffled).domains["code"] == folded(history).domains["code"]


def test_a_sequence_already_folded_changes_nothing() -> None:
    once = apply_reward(EMPTY, reward(), 5)
    assert apply_reward(once, reward("other"), 5) is once
    assert apply_reward(once, reward("other"), 4) is once


def test_the_window_holds_the_newest_120_by_end_of_attempt() -> None:
    history = [reward(f"t{i}", ended_at=float(i)) for i in range(WINDOW + 5)]
    kept = folded(history).domains["code"]
    assert kept.count == WINDOW
    assert kept.scores[0].attempt_id == "t5:1"


def test_a_reward_older_than_a_full_window_is_ignored_but_counts_as_read() -> None:
    full = folded([reward(f"t{i}", ended_at=100.0 + i) for i in range(WINDOW)])
    late = apply_reward(full, reward("late", score=0.0, ended_at=99.0), full.last_seq + 1)
    assert late.last_seq == full.last_seq + 1
    assert (late.domains, late.total_tasks, late.consecutive_losses) == (full.domains, full.total_tasks, 0)


def test_a_late_reward_is_ordered_by_age_within_the_window() -> None:
    profile = folded([reward("b", ended_at=2.0), reward("c", ended_at=3.0), reward("a", ended_at=1.0)])
    assert [entry.attempt_id[0] for entry in profile.domains["code"].scores] == ["a", "b", "c"]


def test_a_twin_replaces_the_score_and_counts_once() -> None:
    rules = reward(score=1.0, ended_at=5.0, tokens=10, seconds=2.0)
    profile = folded([rules, reward("u", ended_at=6.0), reward(score=0.25, ended_at=50.0, tokens=99)])
    evidence = profile.domains["code"]
    assert [(entry.score, entry.ended_at) for entry in evidence.scores] == [(0.25, 5.0), (1.0, 6.0)]
    assert (profile.total_tasks, profile.tokens, profile.seconds) == (2, 10, 2.0)
    assert (evidence.count, evidence.mean) == (2, 0.625)


def test_success_rate_is_the_share_of_scores_of_at_least_a_half_over_all_domains() -> None:
    profile = folded([reward("a", 0.5), reward("b", 0.49), reward("c", 1.0, domain_token="data"), reward("d", 0.0)])
    assert profile.success_rate == 0.5


def test_losses_are_counted_in_a_row() -> None:
    assert folded([reward("a", 0.0), reward("b", 0.2)]).consecutive_losses == 2
    assert folded([reward("a", 0.0), reward("b", 0.9), reward("c", 0.0)]).consecutive_losses == 1


def test_tokens_and_seconds_are_summed() -> None:
    profile = folded([reward("a", tokens=5, seconds=1.5), reward("b", tokens=7, seconds=0.5)])
    assert (profile.tokens, profile.seconds, profile.total_tasks) == (12, 2.0, 2)


def test_only_so_many_domains_are_kept_the_longest_unused_go() -> None:
    profile = folded([reward(f"t{i}", ended_at=float(i), domain_token=f"d{i}") for i in range(MAX_DOMAINS + 2)])
    assert len(profile.domains) == MAX_DOMAINS
    assert "d0" not in profile.domains
    assert f"d{MAX_DOMAINS + 1}" in profile.domains


def test_a_summary_has_counts_and_means_and_only_the_newest_scores() -> None:
    profile = folded([reward(f"t{i}", ended_at=float(i), domain_token="code" if i % 2 else "data") for i in range(60)])
    short = summary(profile)
    assert sum(len(evidence.scores) for evidence in short.domains.values()) == 10
    assert [(e.count, e.mean) for e in short.domains.values()] == [(e.count, e.mean) for e in profile.domains.values()]


def test_evidence_before_a_change_is_dropped_and_does_not_return() -> None:
    good = [reward(f"g{n}", 1.0, n) for n in range(60)]
    bad = [reward(f"b{n}", 0.0, 60 + n) for n in range(12)]
    profile, changes = EMPTY, []
    for seq, one in enumerate([*good, *bad], 1):
        before, profile = profile, apply_reward(profile, one, seq, forget=True)
        changes.append(change_between(before, profile))

    assert (profile.domains["code"].mean, profile.domains["code"].count <= 12) == (0.0, True)
    assert [change for change in changes if change] == ["code: from 0.97 over 62 to 0.00 over 3"]
    again = apply_reward(profile, good[3], 1000, forget=True)
    assert again.domains == profile.domains
    assert again.total_tasks == profile.total_tasks == 72


def test_without_forgetting_the_window_is_the_only_limit() -> None:
    profile = folded([reward(f"g{n}", 1.0, n) for n in range(60)] + [reward(f"b{n}", 0.0, 60 + n) for n in range(12)])
    assert profile.domains["code"].count == 72
