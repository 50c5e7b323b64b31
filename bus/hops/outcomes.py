"""The decisions that a handler returns about a delivery; only the hop loop carries them out."""

from dataclasses import dataclass

from loom.schemas.envelope import Envelope, Phase
from loom.schemas.task import TaskError


@dataclass(frozen=True)
class Next:
    """Publish the envelope to a phase.

    Args:
        msg_id: Message id of the hop, if it follows from stored state and not from this delivery alone.
    """

    phase: Phase
    envelope: Envelope
    msg_id: str | None = None


@dataclass(frozen=True)
class Later:
    """Schedule the envelope to a phase after `delay_s` seconds; it takes no slot meanwhile.

    Args:
        phase: Default: the phase that decides.
        msg_id: As in `Next`.
    """

    delay_s: float
    envelope: Envelope
    phase: Phase | None = None
    msg_id: str | None = None


@dataclass(frozen=True)
class Fail:
    """Publish the envelope to EVALUATE with an error."""

    error: TaskError
    envelope: Envelope


@dataclass(frozen=True)
class Dead:
    """Store the message as a dead letter and end its task."""

    reason: str


@dataclass(frozen=True)
class Done:
    """Ack the message; nothing follows."""


@dataclass(frozen=True)
class Leave:
    """Leave the message unsettled: another replica of this phase has the claim on its task."""


Outcome = Next | Later | Fail | Dead | Done | Leave
