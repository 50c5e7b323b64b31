"""What a handler decides about a delivery; the hop loop alone carries it out."""

from dataclasses import dataclass

from loom.schemas.envelope import Envelope, Phase
from loom.schemas.task import TaskError


@dataclass(frozen=True)
class Next:
    """Pass the envelope on.

    Args:
        msg_id: The message id when the hop follows from stored state and not from this one input.
    """

    phase: Phase
    envelope: Envelope
    msg_id: str | None = None


@dataclass(frozen=True)
class Later:
    """Hand the envelope to a phase after `delay_s`; meanwhile it holds no slot.

    Args:
        phase: Absent: to the same phase again.
        msg_id: As in Next.
    """

    delay_s: float
    envelope: Envelope
    phase: Phase | None = None
    msg_id: str | None = None


@dataclass(frozen=True)
class Fail:
    """Hand the envelope to EVALUATE with an error."""

    error: TaskError
    envelope: Envelope


@dataclass(frozen=True)
class Dead:
    """Never handle this message again: keep it for an operator and end its task."""

    reason: str


@dataclass(frozen=True)
class Done:
    """Nothing follows."""


@dataclass(frozen=True)
class Leave:
    """Settle nothing: another replica of this phase holds the message's claim."""


Outcome = Next | Later | Fail | Dead | Done | Leave
