"""Notices to SCALE about divided tasks, distinguished from envelopes by the field `type`."""

from typing import TypeAlias

from loom.schemas.base import Message, Undecodable, decode
from loom.schemas.envelope import Envelope
from loom.schemas.tokens import Token


class SubtaskEnded(Message, frozen=True, kw_only=True, tag_field="type", tag="subtask_ended"):
    """A subtask has ended; its record has the result."""

    task_id: Token
    """The divided task."""
    child_id: Token
    """The task of the subtask."""
    subtask: Token
    """Its id within the plan."""


class PlanTimeout(Message, frozen=True, kw_only=True, tag_field="type", tag="plan_timeout"):
    """The deadline of a divided task has passed. Scheduled when its subtasks start."""

    envelope: Envelope
    """Envelope of the parked task; it ends the task if the plan cannot be read."""

    @property
    def task_id(self) -> str:
        """The divided task."""
        return self.envelope.task_id


class ParentEnded(Message, frozen=True, kw_only=True, tag_field="type", tag="parent_ended"):
    """A divided task has ended, so its subtasks must stop."""

    task_id: Token
    """The divided task."""


Notice: TypeAlias = SubtaskEnded | PlanTimeout | ParentEnded
ScaleMessage: TypeAlias = Envelope | Notice


class _Typed(Message, frozen=True, kw_only=True):
    """The field that distinguishes notices."""

    type: str = ""


def read_scale_message(raw: bytes) -> ScaleMessage:
    """Return a message on SCALE's subject: a notice if the field `type` names one, else an Envelope.

    Raises:
        Undecodable: It is neither.
    """
    if b'"type"' in raw and decode(raw, _Typed).type:  # few envelopes contain those bytes: most are decoded once
        notice: Notice = decode(raw, Notice)  # type: ignore[arg-type]  # msgspec takes a union for a type
        return notice
    return decode(raw, Envelope)


def envelope_in(raw: bytes) -> Envelope | None:
    """Return the envelope in a message of the stream TASKS; None without one, or if it cannot be decoded."""
    try:
        message = read_scale_message(raw)
    except Undecodable:
        return None
    if isinstance(message, PlanTimeout):
        return message.envelope
    return message if isinstance(message, Envelope) else None
