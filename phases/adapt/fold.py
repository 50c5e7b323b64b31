"""How a reward changes what is known of a node. Pure, and the same for every replica and every rebuild."""

from hashlib import blake2b

import structlog
from msgspec.structs import replace

from loom.bus.ordered import Stored
from loom.bus.subjects import Subjects
from loom.phases.adapt.change import changed_at
from loom.schemas.learning import MAX_DOMAINS, WINDOW, DomainEvidence, NodeProfile, Reward, Score
from loom.schemas.wire import Undecodable, decode, encode

log = structlog.get_logger()

FORGETTING = "glr_ucb"
SUCCESS = 0.5
"""Least score that counts as a success."""
ID_BYTES = 100
"""Longest id a window keeps as it is: with longer ones a profile whose windows are full would outgrow a message."""


def forgets(policy: str) -> bool:
    """Return whether under that award policy what came before a node's change is forgotten."""
    return policy == FORGETTING


def reward_in(message: Stored, subjects: Subjects) -> Reward | None:
    """Return the reward a message of the stream is; None for what nobody is to learn from."""
    try:
        reward = decode(message.data, Reward)
    except Undecodable as error:
        log.warning("reward_undecodable", subject=message.subject, reason=error.message)
        return None
    if message.subject != subjects.of("reward", reward.node_id, reward.slug):
        log.warning("reward_misaddressed", subject=message.subject, node_id=reward.node_id)
        return None
    return reward


def fold(profile: NodeProfile, reward: Reward, seq: int, *, forget: bool = False) -> NodeProfile:
    """Return `profile` after the reward at stream sequence `seq`.

    A sequence already folded changes nothing, nor does a snapshot. A reward of a known id replaces its twin; one that
    ended before everything in a full window is too late to matter. An inheritance is one more entry of the window,
    whatever number of rewards it stands for, and no task of this node's.

    Args:
        forget: Whether what came before a change of the node in the domain is left out from then on.
    """
    if seq <= profile.last_seq or reward.kind == "snapshot":
        return profile
    profile = replace(profile, last_seq=seq)
    before = profile.domains.get(reward.slug, DomainEvidence())
    after = fold_domain(before, reward, forget=forget)
    if after is before:
        return profile
    counted = reward.kind == "inherit" or _twin(before, reward) is not None
    domains = _newest({**profile.domains, reward.slug: after})
    scores = [score for evidence in domains.values() for score in evidence.scores]
    lost = reward.score < SUCCESS
    losses = profile.consecutive_losses
    return replace(
        profile,
        domains=domains,
        success_rate=sum(score.score >= SUCCESS for score in scores) / len(scores),
        total_tasks=profile.total_tasks + (not counted),
        consecutive_losses=losses if counted else (losses + 1 if lost else 0),
        tokens=profile.tokens + (0 if counted else reward.tokens),
        seconds=profile.seconds + (0.0 if counted else reward.seconds),
        updated_at=max(profile.updated_at, reward.ended_at),
    )


def fold_domain(evidence: DomainEvidence, reward: Reward, *, forget: bool = False) -> DomainEvidence:
    """Return the window with `reward` in its place by end of attempt; unchanged when it comes too late."""
    new = Score(reward_id=kept_id(reward.reward_id), score=reward.score, ended_at=reward.ended_at)
    twin = _twin(evidence, reward)
    if twin is not None:
        new = replace(new, ended_at=twin.ended_at)
        scores = [new if score is twin else score for score in evidence.scores]
    else:
        if reward.ended_at < evidence.since:
            return evidence
        # Stable: of equal times the one that came first stays first.
        scores = sorted((*evidence.scores, new), key=lambda score: score.ended_at)[-WINDOW:]
    since = scores[0].ended_at if len(scores) == WINDOW else evidence.since
    change = changed_at([score.score for score in scores]) if forget else None
    if change is not None:
        since, scores = scores[change].ended_at, scores[change:]
    return DomainEvidence(
        scores=tuple(scores), count=len(scores), mean=sum(score.score for score in scores) / len(scores), since=since
    )


def change_in(before: NodeProfile, after: NodeProfile) -> str | None:
    """Return in words what a fold has found changed about the node; None when it has forgotten nothing."""
    for slug, evidence in after.domains.items():
        known = before.domains.get(slug)
        if known is not None and evidence.count < known.count:
            return f"{slug}: from {known.mean:.2f} over {known.count} to {evidence.mean:.2f} over {evidence.count}"
    return None


def kept_id(reward_id: str) -> str:
    """Return what a window remembers a reward by: its id, or the digest of one that is very long."""
    if len(encode(reward_id)) <= ID_BYTES:
        return reward_id
    return f"x-{blake2b(reward_id.encode(errors='surrogatepass'), digest_size=16).hexdigest()}"


def _twin(evidence: DomainEvidence, reward: Reward) -> Score | None:
    reward_id = kept_id(reward.reward_id)
    return next((score for score in evidence.scores if score.reward_id == reward_id), None)


def _newest(domains: dict[str, DomainEvidence]) -> dict[str, DomainEvidence]:
    """The domains a profile has room for, the longest unused ones left out."""
    if len(domains) <= MAX_DOMAINS:
        return domains
    kept = sorted(domains, key=lambda slug: domains[slug].scores[-1].ended_at)[-MAX_DOMAINS:]
    return {slug: domains[slug] for slug in domains if slug in kept}


def summary(profile: NodeProfile, newest: int = 10) -> NodeProfile:
    """Return the profile small enough to be told to everybody: counts, means, and the newest scores."""
    by_age = sorted(
        ((score.ended_at, slug, score) for slug, ev in profile.domains.items() for score in ev.scores),
        key=lambda item: item[0],
    )[-newest:]
    kept = {slug: tuple(score for _, s, score in by_age if s == slug) for slug in profile.domains}
    return replace(profile, domains={slug: replace(ev, scores=kept[slug]) for slug, ev in profile.domains.items()})
