"""How a reward changes what is known of a node. Pure, and the same for every replica and every rebuild."""

from collections.abc import Mapping
from operator import attrgetter

from msgspec.structs import replace

from loom.bus.stored_rewards import SKEW_S
from loom.phases.adapt.change_detection import changed_at
from loom.phases.adapt.reward_weights import WEIGHTS, attempt_id, judged, own, weight
from loom.schemas.base import total, total_s
from loom.schemas.learning import MAX_DOMAINS, WINDOW, DomainEvidence, NodeProfile, Reward, Score

FORGETTING = "glr_ucb"
SUCCESS = 0.5
"""Least score that counts as a success."""


_score, _ended_at, _attempt_id = attrgetter("score"), attrgetter("ended_at"), attrgetter("attempt_id")


def forgets(policy: str) -> bool:
    """Return whether under that award policy what came before a node's change is forgotten."""
    return policy == FORGETTING


def is_dated_ahead(profile: NodeProfile, at: float) -> bool:
    """Return whether a profile holds an attempt that ended more than a few seconds after server time `at`."""
    times = [profile.updated_at]
    for evidence in profile.domains.values():
        times += [evidence.since, *(score.ended_at for score in evidence.scores)]
    return max(times) > at + SKEW_S


def apply_reward(
    profile: NodeProfile,
    reward: Reward,
    seq: int,
    *,
    forget: bool = False,
    weights: Mapping[str, float] = WEIGHTS,
) -> NodeProfile:
    """Return `profile` after the reward at stream sequence `seq`.

    A sequence already folded changes nothing, nor does a snapshot; the word of a source without weight is read, and no
    more. An attempt is one entry of its window, however many judge it; one that ended before everything in a full
    window is too late to matter. An inheritance is one more entry, whatever number of rewards it stands for, and no
    task of this node's.

    Losses in a row are counted as attempts come in, by the first word on each. When a later word turns a loss into a
    win, or back, they are counted anew: the losses since the last win, by end of attempt, as far as the windows go.

    Args:
        forget: Whether what came before a change of the node in the domain is left out from then on.
        weights: What the judges weigh, as `weights_of` gives it.
    """
    if seq <= profile.last_seq or reward.kind == "snapshot":
        return profile
    profile = replace(profile, last_seq=seq)
    if reward.kind == "reward" and weight(reward.source, weights) == 0:
        return profile
    before = profile.domains.get(reward.domain_token, DomainEvidence())
    known = _known(before, reward)
    new = judged(known, reward, weights)
    after = _with(before, known, new, forget=forget)
    if after is before:
        return profile
    counted = reward.kind == "inherit" or known is not None
    domains = _newest({**profile.domains, reward.domain_token: after})
    wins = sum(sum(map(SUCCESS.__le__, map(_score, evidence.scores))) for evidence in domains.values())
    losses = profile.consecutive_losses
    if not counted:
        losses = total(losses, 1) if _lost(new) else 0
    elif known is not None and reward.kind == "reward" and _lost(known) != _lost(new):
        losses = _losses_in_a_row(domains)
    return replace(
        profile,
        domains=domains,
        success_rate=wins / sum(len(evidence.scores) for evidence in domains.values()),
        total_tasks=total(profile.total_tasks, 0 if counted else 1),
        consecutive_losses=losses,
        tokens=total(profile.tokens, 0 if counted else reward.tokens),
        seconds=total_s(profile.seconds, 0.0 if counted else reward.seconds),
        updated_at=max(profile.updated_at, reward.ended_at),
    )


def own_by_age(domains: Mapping[str, DomainEvidence]) -> list[Score]:
    """Return what a node has earned itself, in whatever domain, oldest first."""
    scores = own(score for evidence in domains.values() for score in evidence.scores)
    return sorted(scores, key=_ended_at)


def _with(evidence: DomainEvidence, known: Score | None, new: Score, *, forget: bool) -> DomainEvidence:
    """The window with `new` in the place of `known`, or in its own by end of attempt; unchanged when it is too late."""
    if known is not None:
        scores = [new if score is known else score for score in evidence.scores]
    else:
        if new.ended_at < evidence.since:
            return evidence
        # Stable: of equal times the one that came first stays first.
        scores = sorted((*evidence.scores, new), key=_ended_at)[-WINDOW:]
    since = scores[0].ended_at if len(scores) == WINDOW else evidence.since
    change = changed_at(list(map(_score, scores))) if forget else None
    if change is not None:
        since, scores = scores[change].ended_at, scores[change:]
    mean = sum(map(_score, scores)) / len(scores)
    return DomainEvidence(scores=tuple(scores), count=len(scores), mean=mean, since=since)


def _known(evidence: DomainEvidence, reward: Reward) -> Score | None:
    wanted = attempt_id(reward)
    ids = list(map(_attempt_id, evidence.scores))
    return evidence.scores[ids.index(wanted)] if wanted in ids else None


def _lost(score: Score) -> bool:
    return score.score < SUCCESS


def _losses_in_a_row(domains: Mapping[str, DomainEvidence]) -> int:
    newest = own_by_age(domains)[::-1]
    return next((number for number, score in enumerate(newest) if not _lost(score)), len(newest))


def change_in(before: NodeProfile, after: NodeProfile) -> str | None:
    """Return in words what a fold has found changed about the node; None when it has forgotten nothing."""
    for domain_token, evidence in after.domains.items():
        known = before.domains.get(domain_token)
        if known is not None and evidence.count < known.count:
            return (
                f"{domain_token}: from {known.mean:.2f} over {known.count} to {evidence.mean:.2f} over {evidence.count}"
            )
    return None


def _newest(domains: dict[str, DomainEvidence]) -> dict[str, DomainEvidence]:
    """The domains a profile has room for, the longest unused ones left out."""
    if len(domains) <= MAX_DOMAINS:
        return domains
    kept = sorted(domains, key=lambda domain_token: domains[domain_token].scores[-1].ended_at)[-MAX_DOMAINS:]
    return {domain_token: domains[domain_token] for domain_token in domains if domain_token in kept}


def summary(profile: NodeProfile, newest: int = 10) -> NodeProfile:
    """Return the profile small enough to be told to everybody: counts, means, and the newest scores."""
    by_age = sorted(
        ((score.ended_at, domain_token, score) for domain_token, ev in profile.domains.items() for score in ev.scores),
        key=lambda item: item[0],
    )[-newest:]
    kept = {
        domain_token: tuple(score for _, s, score in by_age if s == domain_token) for domain_token in profile.domains
    }
    return replace(
        profile,
        domains={domain_token: replace(ev, scores=kept[domain_token]) for domain_token, ev in profile.domains.items()},
    )
