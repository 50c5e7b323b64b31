"""Reads the messages of the stream REWARDS: what a reward claims to be must agree with its subject."""

from loom.bus.discards import Discards
from loom.bus.ordered import Stored
from loom.bus.subjects import Subjects
from loom.schemas.identity import ADAPT
from loom.schemas.learning import Reward
from loom.schemas.wire import Undecodable, decode

SKEW_S = 5.0
"""How far the clock of a judge may be ahead of the server's."""


def reward_in(message: Stored, subjects: Subjects, discards: Discards) -> Reward | None:
    """Return the reward that a message of the stream is; None for one that cannot be used, which is counted.

    The permissions of the server pin a subject, not a body. A reward whose source, owner, node or domain are not those
    of its subject is left out, and so is an inheritance or a snapshot of any source but ADAPT.
    """
    try:
        reward = decode(message.data, Reward)
    except Undecodable as error:
        discards.add("reward_undecodable", reason=error.message, subject=message.subject)
        return None
    if message.subject != subjects.of("reward", reward.source, reward.owner, reward.node_id, reward.domain_token):
        reason = f"its body is about node {reward.node} and domain {reward.domain_token}, by {reward.source}"
        discards.add("reward_misaddressed", reason=reason, subject=message.subject)
        return None
    if reward.kind != "reward" and reward.source != ADAPT:
        reason = f"only {ADAPT} publishes rewards of the kind {reward.kind}"
        discards.add("reward_kind_forbidden", reason=reason, subject=message.subject)
        return None
    if reward.kind != "snapshot" and reward.ended_at > message.stored_at + SKEW_S:
        reason = f"its attempt ended {reward.ended_at - message.stored_at:.0f} s after the reward was stored"
        discards.add("reward_dated_ahead", reason=reason, subject=message.subject)
        return None
    return reward
