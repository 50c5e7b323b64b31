"""What SCALE reads besides envelopes: notices about divided tasks, distinguished by the field `type`."""

from typing import TypeAlias

from loom.schemas.base import Message, Undecodable, decode
from loom.schemas.envelope import Envelope
from loom.schemas.tokens import Token


class SubtaskEnded(Message, frozen=True, kw_only=True, tag_field="type", tag="subtask_ended"):
    """A subtask has ended; its record has the result."""

    task_id: Token
    """The divided task."""
    child_id: Token
    """The task that the subtask was."""
    subtask: Token
    """Its id within the plan."""


class PlanTimeout(Message, frozen=True, kw_only=True, tag_field="type", tag="plan_timeout"):
    """The deadline of a divided task has come. Scheduled when its subtasks begin."""

    envelope: Envelope
    """The parked task's: it ends by this one where its plan cannot be read."""

    @property
    def task_id(self) -> str:
        """The divided task."""
        return self.envelope.task_id


class ParentEnded(Message, frozen=True, kw_only=True, tag_field="type", tag="parent_ended"):
    """A divided task has ended, so its subtasks are to stop."""

    task_id: Token
    """The divided task."""


Notice: TypeAlias = SubtaskEnded | PlanTimeout | ParentEnded
ScaleMessage: TypeAlias = Envelope | Notice


class _Typed(Message, frozen=True, kw_only=True):
    """The one field by which notices are distinguished."""

    type: str = ""


def read_scale_message(raw: bytes) -> ScaleMessage:
    """Return a message on SCALE's subject: a notice where the field `type` names one, else an Envelope.

    Raises:
        Undecodable: It is neither.
    """
    if b'"type"' in raw and decode(raw, _Typed).type:  # few envelopes have those letters: most are read once
        notice: Notice = decode(raw, Notice)  # type: ignore[arg-type]  # msgspec takes a union for a type
        return notice
    return decode(raw, Envelope)


def envelope_in(raw: bytes) -> Envelope | None:
    """Return the envelope that a message of the stream TASKS carries; None where it carries none or is unreadable."""
    try:
        message = read_scale_message(raw)
    except Undecodable:
        return None
    if isinstance(message, PlanTimeout):
        return message.envelope
    return message if isinstance(message, Envelope) else None
