"""The fold with counters gives the profiles of a fold that scans every window, at a cost that does not grow."""

from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from loom.phases.adapt import evidence as fold
from loom.phases.adapt.change_detection import RECENT, TEST_EVERY, change_point, recent_change_point
from loom.phases.adapt.evidence import apply_reward
from loom.phases.adapt.retirement_policy import newest_own
from loom.phases.adapt.reward_weights import attempt_id, own_scores, scored
from loom.schemas.base import decode, encode
from loom.schemas.learning.profile import WINDOW, DomainEvidence, NodeProfile, Score
from loom.schemas.learning.reward import Reward

EMPTY = NodeProfile(node_id="n1")


def reward(task: str = "t", score: float = 1.0, ended_at: float = 0.0, **facts: Any) -> Reward:
    wanted: dict[str, Any] = {"reward_id": f"{task}:1:rules", "domain_token": "code", "attempt": 1, **facts}
    return Reward(task_id=task, node_id="n1", score=score, ended_at=ended_at, **wanted)


class ScanningFold:
    """The reference: it sorts and scans all windows for each reward."""

    def __init__(self, *, forget: bool) -> None:
        self.profile = EMPTY
        self._forget = forget
        self._rewards: dict[str, int] = {}

    def apply(self, reward: Reward, seq: int) -> None:
        before = self.profile.domains.get(reward.domain_token, DomainEvidence())
        known = next((score for score in before.scores if score.attempt_id == attempt_id(reward)), None)
        new, self.profile = scored(known, reward), replace(self.profile, last_seq=seq)
        if known is None and new.ended_at < before.since:
            return
        after = self._window(reward.domain_token, before, known, new)
        domains = {**self.profile.domains, reward.domain_token: after}
        self.profile = replace(
            self.profile,
            domains=domains,
            success_rate=self._success_rate(domains),
            total_tasks=self.profile.total_tasks + (reward.kind == "reward" and known is None),
            consecutive_losses=self._losses(reward, known, new, domains),
            updated_at=max(self.profile.updated_at, reward.ended_at),
        )

    def _window(self, token: str, before: DomainEvidence, known: Score | None, new: Score) -> DomainEvidence:
        if known == new:
            return before
        scores = [new if score is known else score for score in before.scores]
        if known is None:
            scores = sorted((*scores, new), key=lambda score: score.ended_at)[-WINDOW:]
        since = scores[0].ended_at if len(scores) == WINDOW else before.since
        self._rewards[token] = self._rewards.get(token, 0) + 1
        if self._forget:
            test = recent_change_point if self._rewards[token] % TEST_EVERY else change_point
            change = test([score.score for score in scores])
            if change is not None:
                since, scores = scores[change].ended_at, scores[change:]
        mean = sum(score.score for score in scores) / len(scores)
        return DomainEvidence(scores=tuple(scores), count=len(scores), mean=mean, since=since)

    @staticmethod
    def _success_rate(domains: Mapping[str, DomainEvidence]) -> float:
        scores = [score.score for evidence in domains.values() for score in evidence.scores]
        return sum(score >= fold.SUCCESS for score in scores) / len(scores)

    def _losses(self, reward: Reward, known: Score | None, new: Score, domains: Mapping[str, DomainEvidence]) -> int:
        lost = new.score < fold.SUCCESS
        if reward.kind != "reward" or (known is not None and (known.score < fold.SUCCESS) == lost):
            return self.profile.consecutive_losses
        if known is None:
            return self.profile.consecutive_losses + 1 if lost else 0
        scores = [score for evidence in domains.values() for score in evidence.scores]
        newest = sorted(own_scores(scores), key=lambda score: score.ended_at)[::-1]
        return next((n for n, score in enumerate(newest) if score.score >= fold.SUCCESS), len(newest))


def without_counters(profile: NodeProfile) -> NodeProfile:
    domains = {token: replace(held, losses=None, untested=0) for token, held in profile.domains.items()}
    return replace(profile, domains=domains)


def history(random: Random, rewards: int, tasks: int) -> Iterator[Reward]:
    """Yield rewards out of order, of several sources and domains, in which the node changes once."""
    for number in range(rewards):
        task = random.randrange(max(0, number - tasks), number + 1)
        yield reward(
            f"t{task}",
            random.choice([0.0, 1.0, random.random()]) if number < rewards // 2 else 0.0,
            float(task) if random.random() < 0.7 else float(random.randrange(rewards)),
            domain_token=random.choice(["code", "code", "code", "data"]),
            source=random.choice(["rules", "rules", "judge", "person", "a-source-with-a-long-name"]),
            kind="inherit" if random.random() < 0.02 else "reward",
        )


@given(st.randoms(use_true_random=False), st.booleans(), st.sampled_from([(40, 12), (400, 150)]))
def test_the_profiles_equal_those_of_a_fold_that_scans(random: Random, forget: bool, size: tuple[int, int]) -> None:
    reference, profile = ScanningFold(forget=forget), EMPTY
    for seq, earned in enumerate(history(random, *size), start=1):
        profile = apply_reward(profile, earned, seq, forget=forget)
        reference.apply(earned, seq)
        if seq % 7 == 0:  # a replica that starts again continues from the stored profile
            profile = decode(encode(profile), NodeProfile)
        assert without_counters(profile) == reference.profile


class Untouchable(tuple[Score, ...]):
    """A window that must not be read."""

    __slots__ = ()

    def __iter__(self) -> Any:
        raise AssertionError("a reward in one domain has read the window of another")


def test_a_reward_reads_no_window_of_another_domain() -> None:
    window = Untouchable(Score(attempt_id=f"t{n}:1", score=float(n % 4 > 0), ended_at=n) for n in range(WINDOW))
    others = {f"d{n}": DomainEvidence(scores=window, count=WINDOW, mean=0.75, losses=WINDOW // 4) for n in range(4)}
    profile = NodeProfile(node_id="n1", domains=others)
    after = apply_reward(profile, reward(score=0.0, ended_at=500.0), 1, forget=True)
    assert after.success_rate == pytest.approx(3 * WINDOW / (4 * WINDOW + 1))


def test_the_change_test_runs_at_every_eighth_reward_of_a_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[int] = []
    monkeypatch.setattr(fold, "change_point", lambda scores: tested.append(len(scores)))
    profile, seq = EMPTY, 0
    for number in range(24):
        for token in ("code", "data") if number % 2 else ("code",):
            seq += 1
            earned = reward(f"t{number}", ended_at=float(number), domain_token=token)
            profile = apply_reward(profile, earned, seq, forget=True)
    assert sorted(tested) == [8, 8, 16, 24]
    apply_reward(profile, reward("t99", ended_at=99.0), seq + 8, forget=False)
    assert len(tested) == 4


def test_the_test_of_recent_splits_reads_no_others() -> None:
    random = Random(1)
    for _ in range(200):
        scores = [float(random.random() < 0.9) for _ in range(100)] + [0.0] * random.randrange(12)
        change = recent_change_point(scores)
        assert change is None or 3 <= len(scores) - change <= RECENT
        assert change is None or change_point(scores) is not None


@pytest.mark.parametrize("good", range(40, 48))
def test_an_abrupt_change_is_found_at_once(good: int) -> None:
    assert rewards_until_found([1.0] * good + [0.0] * 12) == soonest([1.0] * good + [0.0] * 12)


@pytest.mark.parametrize("good", range(40, 48))
def test_a_slow_change_is_found_at_most_seven_rewards_later(good: int) -> None:
    scores = [1.0] * good + [0.6] * 60
    assert soonest(scores) <= rewards_until_found(scores) <= soonest(scores) + TEST_EVERY - 1


def soonest(scores: list[float]) -> int:
    """Return the number of scores after which a test of all splits for each reward finds a change."""
    return next(end for end in range(1, len(scores)) if change_point(scores[:end]) is not None)


def rewards_until_found(scores: list[float]) -> int:
    profile = EMPTY
    for number, score in enumerate(scores, start=1):
        profile = apply_reward(profile, reward(f"t{number}", score, float(number)), number, forget=True)
        if profile.domains["code"].count < number:
            return number
    raise AssertionError("no change was found")


def test_a_window_without_counters_is_counted_once() -> None:
    scores = tuple(Score(attempt_id=f"t{n}:1", score=float(n % 2), ended_at=n) for n in range(10))
    old = NodeProfile(node_id="n1", domains={"code": DomainEvidence(scores=scores, count=10, mean=0.5)})
    after = apply_reward(old, reward(score=0.0, ended_at=20.0), 1)
    assert (after.domains["code"].losses, after.success_rate) == (6, 5 / 11)


@given(st.randoms(use_true_random=False))
def test_the_newest_entries_are_those_of_a_sort(random: Random) -> None:
    profile = EMPTY
    for seq, earned in enumerate(history(random, 60, 20), start=1):
        profile = apply_reward(profile, replace(earned, ended_at=earned.ended_at // 4), seq)
    entries = [(token, score) for token, held in profile.domains.items() for score in held.scores]
    by_age = sorted(entries, key=lambda entry: entry[1].ended_at)
    assert list(fold.newest_first(profile.domains)) == by_age[::-1]
    kept = {token: tuple(score for held, score in by_age[-10:] if held == token) for token in profile.domains}
    assert {token: held.scores for token, held in fold.summary(profile).domains.items()} == kept
    own = [score.score for _, score in by_age if not score.attempt_id.startswith("inherit:")]
    assert newest_own(profile) == own[-10:]
