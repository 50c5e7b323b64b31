"""The weighted mean of the scores that several sources give one attempt: one entry of a window. Pure."""

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from math import fsum

from loom.schemas.identity import RULES
from loom.schemas.learning.profile import Score
from loom.schemas.learning.reward import Reward

INHERITED = "inherit:"
"""Prefix of the id of an inherited entry."""
WEIGHTS: Mapping[str, float] = {"person": 3.0}
"""Weights of sources by default."""
DEFAULT_WEIGHT = 1.0
"""Weight of a source without an entry."""
MAX_SOURCES = 4
"""Sources kept for one attempt. This and the lengths below bound the bytes of a profile with full windows."""
ID_LENGTH, NAME_LENGTH = 72, 8
"""Longest attempt id, and longest source name, that an entry keeps unchanged; of longer ones it keeps a digest."""
MEAN_DIGITS, SOURCE_DIGITS = 6, 4
"""Decimals kept of the mean, and of the score of each source."""


def weights_of(setting: Mapping[str, float]) -> Mapping[str, float]:
    """Return the weight of each named source, by its key in an entry; `person` weighs 3 unless `setting` has it.

    Args:
        setting: `ClusterConfig.judge_weights`.
    """
    return {_source_key(source): weight for source, weight in {**WEIGHTS, **setting}.items()}


def source_weight(source: str, weights: Mapping[str, float]) -> float:
    """Return the weight of a source; 0: its scores are ignored."""
    return weights.get(_source_key(source), DEFAULT_WEIGHT)


def attempt_id(reward: Reward) -> str:
    """Return the id of a reward's attempt in a window: `task:attempt`, independent of the reward's own id.

    A very long one is replaced by its digest. The id of an inheritance is `inherit:` and the other node's name.
    """
    if reward.kind == "inherit":
        inherited_id = INHERITED + reward.reward_id.removeprefix(INHERITED)
        return inherited_id if len(inherited_id) <= ID_LENGTH else f"{INHERITED}{_digest(inherited_id, 16)}"
    key = f"{reward.task_id}:{reward.attempt}"
    return key if len(key) <= ID_LENGTH else f"x-{_digest(key, 16)}"


def scored(known: Score | None, reward: Reward, weights: Mapping[str, float] = WEIGHTS) -> Score:
    """Return the entry of an attempt after one more reward: sum(weight · score) / sum(weight) over its sources.

    A later score of a source replaces its earlier one. Of more than four sources, the four heaviest count; among equal
    weights, the earliest.

    Args:
        known: The entry of the same attempt so far.
        reward: A reward from a source with a weight above 0, or an inheritance.
        weights: Weights as returned by `weights_of`.
    """
    ended_at = known.ended_at if known else reward.ended_at
    single = Score(attempt_id=attempt_id(reward), score=reward.score, ended_at=ended_at)
    scores = known.by_source if known else {}
    if reward.kind == "inherit" or (reward.source == RULES and not scores):
        return single
    if known and not scores:
        scores = {RULES: round(known.score, SOURCE_DIGITS)}
    scores = {**scores, _source_key(reward.source): round(reward.score, SOURCE_DIGITS)}
    heaviest = sorted(scores, key=lambda source: -weights.get(source, DEFAULT_WEIGHT))[:MAX_SOURCES]
    scores = {source: scores[source] for source in heaviest}
    greatest = weights.get(heaviest[0], DEFAULT_WEIGHT)
    # Relative to the heaviest weight, so that no weight is lost in rounding.
    shares = {source: weights.get(source, DEFAULT_WEIGHT) / greatest for source in scores}
    mean = fsum(shares[source] * score for source, score in scores.items()) / fsum(shares.values())
    return Score(attempt_id=single.attempt_id, score=round(mean, MEAN_DIGITS), ended_at=ended_at, by_source=scores)


def is_own(score: Score) -> bool:
    """Return whether the node has earned an entry itself, so that it is not an inherited one."""
    return not score.attempt_id.startswith(INHERITED)


def own_scores(scores: Iterable[Score]) -> list[Score]:
    """Return the entries that the node has earned itself, without inherited ones."""
    return list(filter(is_own, scores))


def _source_key(source: str) -> str:
    """Return the key of a source in an entry: its name, or the digest of a long name."""
    return source if len(source) <= NAME_LENGTH else _digest(source, NAME_LENGTH // 2)


def _digest(text: str, size: int) -> str:
    return blake2b(text.encode(), digest_size=size).hexdigest()
