"""Applies a reward to the profile of its node. Pure, and equal in every replica and every rebuild."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from heapq import merge
from itertools import islice, repeat, takewhile
from operator import attrgetter

from msgspec.structs import replace

from loom.phases.adapt.change_detection import TEST_EVERY, change_point, recent_change_point
from loom.phases.adapt.reward_weights import WEIGHTS, attempt_id, is_own, scored, source_weight
from loom.schemas.base import total, total_s
from loom.schemas.learning.profile import MAX_DOMAINS, WINDOW, DomainEvidence, NodeProfile, Score
from loom.schemas.learning.reward import Reward

FORGETTING = "glr_ucb"
SUCCESS = 0.5
"""Least score that counts as a success."""

_NO_EVIDENCE = DomainEvidence()
_ended_at = attrgetter("ended_at")


def forgets(policy: str) -> bool:
    """Return whether the award policy drops the scores from before a change of the node."""
    return policy == FORGETTING


def newest_time(profile: NodeProfile) -> float:
    """Return the latest server time in a profile: no attempt of it ended later."""
    times = [profile.updated_at]
    for evidence in profile.domains.values():
        times += [evidence.since, *(score.ended_at for score in evidence.scores)]
    return max(times)


def apply_reward(
    profile: NodeProfile, reward: Reward, seq: int, *, forget: bool = False, weights: Mapping[str, float] = WEIGHTS
) -> NodeProfile:
    """Return `profile` after the reward at stream sequence `seq`.

    An applied sequence changes nothing, nor does a snapshot. A source of weight 0 changes the sequence only. An attempt
    is one entry of its window, with the scores of all its sources. One that ended before every entry of a full window
    is ignored. An inheritance is one entry, for any number of rewards, and is not a task of this node.

    The count of consecutive losses uses the first score of each attempt. If a later score turns a loss into a win, or
    the reverse, the count is recomputed from the stored windows, ordered by when attempts ended.

    Args:
        profile: The profile before the reward.
        reward: A reward, snapshot or inheritance of the node.
        seq: Sequence of the reward in its stream.
        forget: Whether scores from before a change of the node in the domain are dropped.
        weights: Weights of the sources, as returned by `weights_of`.
    """
    if seq <= profile.last_seq or reward.kind == "snapshot":
        return profile
    if reward.kind == "reward" and source_weight(reward.source, weights) == 0:
        return replace(profile, last_seq=seq)
    before = profile.domains.get(reward.domain_token, _NO_EVIDENCE)
    index = _index_of(before, attempt_id(reward))
    known = None if index is None else before.scores[index]
    new = scored(known, reward, weights)
    after = _with_entry(before, index, new, forget=forget)
    if after is before:
        return replace(profile, last_seq=seq)
    domains = _newest({**profile.domains, reward.domain_token: after})
    is_new_task = reward.kind == "reward" and known is None
    is_revised = reward.kind == "reward" and known is not None and _lost(known) != _lost(new)
    losses = _consecutive_losses(domains) if is_revised else profile.consecutive_losses
    if is_new_task:
        losses = total(losses, 1) if _lost(new) else 0
    return replace(
        profile,
        last_seq=seq,
        domains=domains,
        success_rate=_success_rate(domains),
        total_tasks=total(profile.total_tasks, 1 if is_new_task else 0),
        consecutive_losses=losses,
        tokens=total(profile.tokens, reward.tokens if is_new_task else 0),
        seconds=total_s(profile.seconds, reward.seconds if is_new_task else 0.0),
        updated_at=max(profile.updated_at, reward.ended_at),
    )


def losses_in(evidence: DomainEvidence) -> int:
    """Return the number of failures in a window; an absent or impossible counter is replaced by a count."""
    return _checked(evidence.losses, evidence.scores)


def _checked(losses: int | None, scores: Sequence[Score]) -> int:
    if losses is None or not 0 <= losses <= len(scores):
        return sum([_lost(score) for score in scores])
    return losses


def _success_rate(domains: Mapping[str, DomainEvidence]) -> float:
    """Return the share of successes among all entries of all windows, from the counters of the windows."""
    entries = sum([len(evidence.scores) for evidence in domains.values()])
    return (entries - sum([losses_in(evidence) for evidence in domains.values()])) / entries


def newest_first(domains: Mapping[str, DomainEvidence]) -> Iterator[tuple[str, Score]]:
    """Yield domain_token and entry for all entries, the newest first; the cost is that of the entries that are read."""
    windows = [zip(repeat(token), reversed(domains[token].scores)) for token in reversed([*domains])]
    return merge(*windows, key=lambda entry: -entry[1].ended_at)


def _with_entry(evidence: DomainEvidence, index: int | None, new: Score, *, forget: bool) -> DomainEvidence:
    """Return the window with `new` in the place `index`, or inserted by end of attempt; unchanged if it is too old.

    The cost is one copy and two sums of the window. The counter of failures is kept, and the change test considers all
    splits for every eighth reward only. That reward is the same one in each replica and rebuild, because the window
    stores the counter.
    """
    scores = evidence.scores
    losses = losses_in(evidence) + _lost(new)
    if index is not None:
        losses -= _lost(scores[index])
        if scores[index] == new:
            return replace(evidence, losses=losses)  # the source does not count
        scores = (*scores[:index], new, *scores[index + 1 :])
    elif new.ended_at < evidence.since:
        return evidence
    else:
        scores = _inserted(scores, new)
        if len(scores) > WINDOW:
            losses -= _lost(scores[0])
            scores = scores[1:]
    since = scores[0].ended_at if len(scores) == WINDOW else evidence.since
    untested, values = (evidence.untested + 1) % TEST_EVERY, [score.score for score in scores]
    change = (recent_change_point(values) if untested else change_point(values)) if forget else None
    if change is not None:
        since, scores, values = scores[change].ended_at, scores[change:], values[change:]
        losses = _checked(None, scores)
    return DomainEvidence(
        scores=scores,
        count=len(scores),
        mean=sum(values) / len(values),
        since=since,
        losses=_checked(losses, scores),
        untested=untested,
    )


def _inserted(scores: tuple[Score, ...], new: Score) -> tuple[Score, ...]:
    """Return a window with one more entry, behind those with the same end of the attempt."""
    if not scores or new.ended_at >= scores[-1].ended_at:
        return (*scores, new)
    at = bisect_right(scores, new.ended_at, key=_ended_at)
    return (*scores[:at], new, *scores[at:])


def _index_of(evidence: DomainEvidence, wanted: str) -> int | None:
    """Return the place of an attempt's entry; None if the window has none."""
    ids = [score.attempt_id for score in evidence.scores]
    return ids.index(wanted) if wanted in ids else None


def _lost(score: Score) -> bool:
    return score.score < SUCCESS


def _consecutive_losses(domains: Mapping[str, DomainEvidence]) -> int:
    """Return the number of failures after the newest success, among the entries that the node has earned itself."""
    own = (score for _, score in newest_first(domains) if is_own(score))
    return sum(1 for _ in takewhile(_lost, own))


def change_between(before: NodeProfile, after: NodeProfile) -> str | None:
    """Return a text on the change of the node that a reward has revealed; None if no scores were dropped."""
    for domain_token, evidence in after.domains.items():
        known = before.domains.get(domain_token)
        if known is not None and known is not evidence and evidence.count < known.count:
            return (
                f"{domain_token}: from {known.mean:.2f} over {known.count} to {evidence.mean:.2f} over {evidence.count}"
            )
    return None


def _newest(domains: dict[str, DomainEvidence]) -> dict[str, DomainEvidence]:
    """Return at most `MAX_DOMAINS` domains, without those that were unused for longest."""
    if len(domains) <= MAX_DOMAINS:
        return domains
    kept = sorted(domains, key=lambda domain_token: domains[domain_token].scores[-1].ended_at)[-MAX_DOMAINS:]
    return {domain_token: domains[domain_token] for domain_token in domains if domain_token in kept}


def summary(profile: NodeProfile, newest: int = 10) -> NodeProfile:
    """Return a profile small enough to be published: counts, means, and the `newest` scores."""
    kept: dict[str, list[Score]] = {}
    for token, score in islice(newest_first(profile.domains), newest):
        kept.setdefault(token, []).append(score)
    domains = {
        token: replace(evidence, scores=tuple(reversed(kept.get(token, []))))
        for token, evidence in profile.domains.items()
    }
    return replace(profile, domains=domains)
