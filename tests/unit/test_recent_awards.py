"""Recent awards of MATCH to each node: held for the length of a run, and pending until the reward."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import ad, envelope

from loom.phases.match.ranked_bids import Awarded
from loom.phases.match.recent_awards import MAX_PENDING_S, SWEEP_EVERY_S, RecentAwards
from loom.phases.match.scoring import AWARD_TO_RUN_S
from loom.schemas.auction import Award, Bid


class Clock:
    """The time, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("loom.phases.match.recent_awards.time", clock)
    return clock


def note(awards: RecentAwards, task_id: str, node: str = "n1", host: str = "h1", *, expected_s: float = 0.0) -> None:
    bid = Bid(node_id=node, expected_s=expected_s)
    awards.record(envelope(ad(task_id=task_id), now=0), "code", Awarded(Award(node_id=node, host_id=host), bid))


def test_an_award_counts_for_the_length_of_a_run_despite_earlier_awards(clock: Clock) -> None:
    awards = RecentAwards()
    note(awards, "t1")
    note(awards, "t2", expected_s=AWARD_TO_RUN_S / 10)
    note(awards, "t3", "n2")
    assert dict(awards.recent()) == {("local", "h1", "n1"): 2, ("local", "h1", "n2"): 1}
    clock.now += AWARD_TO_RUN_S / 10
    assert dict(awards.recent()) == {("local", "h1", "n1"): 1, ("local", "h1", "n2"): 1}
    clock.now += AWARD_TO_RUN_S
    assert dict(awards.recent()) == {}


def test_an_award_is_pending_until_its_reward_is_known(clock: Clock) -> None:
    awards = RecentAwards()
    for task in ("t1", "t2", "t2"):
        note(awards, task)
    assert dict(awards.pending()) == {("n1", "code"): 2}
    awards.remove_rewarded("n1", "code", ["other:1", "t1:1", "t2:2"])
    awards.remove_rewarded("n1", "data", ["t2:1"])
    awards.remove_rewarded("n2", "code", ["t2:1"])
    assert dict(awards.pending()) == {("n1", "code"): 1}
    awards.remove_rewarded("n1", "code", ["t2:1"])
    assert dict(awards.pending()) == {}


def test_an_award_that_is_never_judged_is_forgotten(clock: Clock) -> None:
    awards = RecentAwards()
    note(awards, "t1")
    clock.now += MAX_PENDING_S / 2
    note(awards, "t2")
    assert dict(awards.pending()) == {("n1", "code"): 2}
    clock.now += MAX_PENDING_S / 2 + SWEEP_EVERY_S
    assert dict(awards.pending()) == {("n1", "code"): 1}
    clock.now += MAX_PENDING_S
    assert dict(awards.pending()) == {}
    assert awards._pending_attempts == {}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), st.integers(0, 5))))
def test_the_counted_awards_are_the_remembered_ones(steps: list[tuple[str, bool, int]]) -> None:
    awards = RecentAwards()
    expected: dict[str, set[str]] = {"a": set(), "b": set()}
    for node, judged, number in steps:
        if judged:
            awards.remove_rewarded(node, "code", [f"t{number}:1"])
            expected[node].discard(f"t{number}:1")
        else:
            note(awards, f"t{number}", node)
            expected[node].add(f"t{number}:1")
    assert dict(awards.pending()) == {(node, "code"): len(tasks) for node, tasks in expected.items() if tasks}
