"""Whether SCALE has something to do with a task: a function of the envelope alone.

SENSE writes into the spec what its settings and the ad's limits say about dividing the task. Every reader after it
reads the envelope and no setting, so that two copies of one message come to the same decision in any process.
"""

from typing import Literal, TypeAlias

from msgspec.structs import replace

from loom.schemas.auction import Award
from loom.schemas.base import cut_note
from loom.schemas.envelope import Envelope, Spec

PLAN = "plan"
"""Key of the ad's context under which a client may give the plan itself, or `true` to have one made."""

Reason: TypeAlias = Literal["no_bids", "divide", "saturated"]
"""What SCALE is to do: ask for a node where no node bids, divide the task, ask for a node beside one that is full."""


def wants_scale(envelope: Envelope) -> Reason | None:
    """Return why a task is SCALE's business after the auction; None where EXECUTE may have it at once."""
    if envelope.award is None:
        return "no_bids"
    if may_divide(envelope):
        return "divide"
    return "saturated" if is_saturated(envelope.award) else None


def may_divide(envelope: Envelope) -> bool:
    """Return whether the task is to be divided, or has been and its parts are not put together yet."""
    spec = envelope.spec
    if spec is None or not spec.divide or spec.whole or envelope.inputs:
        return False
    return envelope.depth < spec.deepest


def is_saturated(award: Award) -> bool:
    """Return whether the winner has no slot free, so that the task is queued."""
    winner = (award.owner, award.node_id, award.host_id)
    return award.backlog > 0 or any(
        bid.load >= 1 for bid in award.bids if (bid.owner, bid.node_id, bid.host_id) == winner
    )


def undivided(spec: Spec, why: str) -> Spec:
    """Return the spec with the reason for which its task is not divided, after the notes it has."""
    note = f"not divided: {why}"
    return spec if note in spec.note else replace(spec, note=cut_note("; ".join(filter(None, (spec.note, note)))))
