"""What the judges of one attempt say together: one entry of a window, however many there are. Pure."""

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from math import fsum

from loom.schemas.identity import RULES
from loom.schemas.learning import Reward, Score

INHERITED = "inherit:"
"""How the id of an inherited entry begins."""
WEIGHTS: Mapping[str, float] = {"person": 3.0}
"""What a source weighs in a cluster that says nothing of it."""
USUAL = 1.0
"""Weight of a source that is not named at all."""
MOST = 4
"""Sources remembered of one attempt. This and the lengths below bound what a profile with full windows takes."""
ID_LENGTH, NAME_LENGTH = 72, 8
"""Characters of an attempt's id, and of a source's name, up to which an entry keeps it as it is."""
DIGITS, WORD_DIGITS = 6, 4
"""Decimals that are kept of a mean of several words, and of each of them."""


def weights_of(setting: Mapping[str, float]) -> Mapping[str, float]:
    """Return what each named source weighs, by the name an entry keeps it under; a person 3 where `setting` is silent.

    Args:
        setting: `ClusterConfig.judge_weights`.
    """
    return {_kept(source): weight for source, weight in {**WEIGHTS, **setting}.items()}


def weight(source: str, weights: Mapping[str, float]) -> float:
    """Return what the word of a source weighs."""
    return weights.get(_kept(source), USUAL)


def attempt_id(reward: Reward) -> str:
    """Return what a window remembers a judged attempt by: `task:attempt`, whatever form the reward's own id has.

    Of one that is very long the digest is kept. What another node has handed on is `inherit:` and its name.
    """
    if reward.kind == "inherit":
        heritage = INHERITED + reward.reward_id.removeprefix(INHERITED)
        return heritage if len(heritage) <= ID_LENGTH else f"{INHERITED}{_digest(heritage, 16)}"
    key = f"{reward.task_id}:{reward.attempt}"
    return key if len(key) <= ID_LENGTH else f"x-{_digest(key, 16)}"


def judged(known: Score | None, reward: Reward, weights: Mapping[str, float] = WEIGHTS) -> Score:
    """Return the entry of an attempt after one more word on it: sum(weight · word) / sum(weight) over the sources.

    A source's later word replaces its earlier one. Of more than four sources the heaviest count, of equals those who
    spoke first.

    Args:
        known: The entry of the same attempt so far.
        reward: Of a source that weighs more than 0, or an inheritance.
        weights: As `weights_of` gives them.
    """
    ended_at = known.ended_at if known else reward.ended_at
    alone = Score(attempt_id=attempt_id(reward), score=reward.score, ended_at=ended_at)
    words = known.by_source if known else {}
    if reward.kind == "inherit" or (reward.source == RULES and not words):
        return alone
    if known and not words:
        words = {RULES: round(known.score, WORD_DIGITS)}
    words = {**words, _kept(reward.source): round(reward.score, WORD_DIGITS)}
    heaviest = sorted(words, key=lambda source: -weights.get(source, USUAL))[:MOST]
    words = {source: words[source] for source in heaviest}
    most = weights.get(heaviest[0], USUAL)
    shares = {
        source: weights.get(source, USUAL) / most for source in words
    }  # of the heaviest: none is lost in rounding
    mean = fsum(shares[source] * word for source, word in words.items()) / fsum(shares.values())
    return Score(attempt_id=alone.attempt_id, score=round(mean, DIGITS), ended_at=ended_at, by_source=words)


def own(scores: Iterable[Score]) -> list[Score]:
    """Return the entries the node has earned itself."""
    return [score for score in scores if not score.attempt_id.startswith(INHERITED)]


def _kept(source: str) -> str:
    """What an entry remembers a source by: its name, or the digest of one that is long."""
    return source if len(source) <= NAME_LENGTH else _digest(source, NAME_LENGTH // 2)


def _digest(text: str, size: int) -> str:
    return blake2b(text.encode(), digest_size=size).hexdigest()
