"""Stored evidence of nodes, as ADAPT writes it."""

from collections.abc import Iterator

from loom.bus.bus import Bus
from loom.phases.adapt.reward_weights import is_own
from loom.phases.adapt.summary_writer import summary_of
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import Reward
from loom.schemas.learning.summary import ProfileSummary


def rewards_in(profile: NodeProfile) -> Iterator[Reward]:
    """Yield a reward for each attempt in the windows of a profile."""
    for token, evidence in profile.domains.items():
        for score in filter(is_own, evidence.scores):
            task_id, _, attempt = score.attempt_id.rpartition(":")
            yield Reward(
                reward_id=f"{score.attempt_id}:rules",
                task_id=task_id,
                attempt=int(attempt) if attempt.isascii() and attempt.isdigit() else 1,
                node_id=profile.node_id,
                owner=profile.owner,
                domain_token=token,
                score=score.score,
                ended_at=score.ended_at,
            )


async def store_profile(bus: Bus, profile: NodeProfile) -> None:
    """Store a profile and its summary, where there is no ADAPT."""
    await bus.bucket("nodes", NodeProfile).create(profile.key, profile)
    summary = summary_of(profile, rewards=rewards_in(profile))
    await bus.bucket("nodes", ProfileSummary).create(summary.key, summary)
