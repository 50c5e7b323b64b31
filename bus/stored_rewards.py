"""Decodes the messages of the stream REWARDS, and checks them against their subjects."""

from loom.bus.logs.discards import Discards
from loom.bus.natsio.stored_message import StoredMessage
from loom.bus.subjects import Subjects
from loom.schemas.base import Undecodable, decode
from loom.schemas.identity import ADAPT
from loom.schemas.learning.reward import Reward

SKEW_S = 5.0
"""Seconds by which the clock of a reward source may be ahead of the server's."""


def reward_in(message: StoredMessage, subjects: Subjects, discards: Discards) -> Reward | None:
    """Return the reward in a message of the stream; None, and a count, for one that is invalid."""
    try:
        reward = decode(message.data, Reward)
    except Undecodable as error:
        discards.add("reward_undecodable", reason=error.message, subject=message.subject)
        return None
    fault = fault_of(reward, message, subjects)
    if fault is not None:
        event, reason = fault
        discards.add(event, reason=reason, subject=message.subject)
        return None
    return reward


def fault_of(reward: Reward, message: StoredMessage, subjects: Subjects) -> tuple[str, str] | None:
    """Return why a stored reward is invalid, as the name of a log event and a reason; None if it is valid.

    Permissions of the server restrict subjects, not bodies. So source, owner, node and domain must be those of the
    subject, and only ADAPT may publish inheritances and snapshots.
    """
    if message.subject != subjects.of("reward", reward.source, reward.owner, reward.node_id, reward.domain_token):
        reason = f"its body is about node {reward.node} and domain {reward.domain_token}, by {reward.source}"
        return "reward_misaddressed", reason
    if reward.kind != "reward" and reward.source != ADAPT:
        return "reward_kind_forbidden", f"only {ADAPT} publishes rewards of the kind {reward.kind}"
    if reward.kind != "snapshot" and reward.ended_at > message.stored_at + SKEW_S:
        late_s = reward.ended_at - message.stored_at
        return "reward_dated_ahead", f"its attempt ended {late_s:.0f} s after the reward was stored"
    return None
