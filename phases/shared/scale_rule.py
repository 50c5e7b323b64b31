"""The rule whether SCALE has something to do with a task: a function of the envelope alone.

SENSE writes into the spec what its settings and the ad's limits permit. Later readers use the envelope and no setting,
so that two copies of a message lead to the same decision in every process.
"""

from typing import Literal, TypeAlias

from msgspec.structs import replace

from loom.schemas.auction import Award
from loom.schemas.base import cut_note
from loom.schemas.envelope import Envelope, Spec

PLAN_KEY = "plan"
"""Key of the ad's context for a plan of the client, or `true` to have a plan made."""

ScaleReason: TypeAlias = Literal["no_bids", "divide", "saturated"]
"""What SCALE does: request a node for a task without offers, divide the task, or request a node besides a full one."""


def scale_reason(envelope: Envelope) -> ScaleReason | None:
    """Return why a task goes to SCALE after the auction; None where it goes to EXECUTE directly."""
    if envelope.award is None:
        return "no_bids"
    if may_divide(envelope):
        return "divide"
    return "saturated" if is_saturated(envelope.award) else None


def may_divide(envelope: Envelope) -> bool:
    """Return whether the task is to be divided, or is divided and waits for its synthesis."""
    spec = envelope.spec
    if spec is None or not spec.divide or spec.whole or envelope.inputs:
        return False
    return envelope.depth < spec.deepest


def is_saturated(award: Award) -> bool:
    """Return whether the winner has no free slot, so that the task is queued."""
    if award.backlog > 0:
        return True
    winner = award.winning_bid
    return winner is not None and winner.load >= 1


def with_undivided_note(spec: Spec, why: str) -> Spec:
    """Return the spec with the reason why its task is not divided appended to its note."""
    note = f"not divided: {why}"
    return spec if note in spec.note else replace(spec, note=cut_note("; ".join(filter(None, (spec.note, note)))))
