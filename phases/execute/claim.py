"""The fence: which message may run which attempt, decided on the record alone. Pure."""

from dataclasses import dataclass
from typing import Literal

from msgspec.structs import replace

from loom.schemas.envelope import Award, Claim, Envelope, RecordVersion, TaskRecord

Standing = Literal["report", "settle", "leave"]


@dataclass(frozen=True)
class Take:
    """Write this record, then run."""

    record: TaskRecord
    attached: bool
    """Whether the run may be going on already."""
    record_version: RecordVersion | None = None
    """Of the record, once it is written."""


@dataclass(frozen=True)
class Drop:
    """This message has nothing left to do."""

    reason: str
    delegated: tuple[str, ...] = ()
    """What a run of an ended task has delegated: nobody wants it any more."""


def claim(record: TaskRecord, envelope: Envelope, award: Award, instance: str, stream_seq: int) -> Take | Drop:
    """Decide whether this message may run its attempt.

    A higher attempt than the record's is taken. The same attempt on the same host is the same run, re-attached.
    The same attempt on another host, and any lower one, is a twin.
    """
    if record.ended:
        return Drop("the task has ended", record.delegated)
    held = record.claim
    if envelope.attempt < held.attempt:
        return Drop("a later attempt is running")
    if envelope.attempt == held.attempt and (held.host_id, held.node_id) != (award.host_id, award.node_id):
        return Drop("the attempt runs on another host")
    mine = Claim(
        attempt=envelope.attempt,
        node_id=award.node_id,
        host_id=award.host_id,
        instance=instance,
        stream_seq=stream_seq,
    )
    return Take(replace(record, claim=mine), attached=envelope.attempt == held.attempt)


def may_report(
    record: TaskRecord, attempt: int, instance: str, stream_seq: int
) -> Literal["report", "settle", "leave"]:
    """Decide what a failed run's message may do, after reading the claim again.

    report: the claim is still this message's and this replica's. settle: another message holds it, or the task
    has ended. leave: another replica works on this very message.
    """
    held = record.claim
    if record.ended or held.attempt != attempt or held.stream_seq != stream_seq:
        return "settle"
    return "report" if held.instance == instance else "leave"
