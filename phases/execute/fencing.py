"""The fence: which message may run which attempt, decided on the record alone. Pure."""

from dataclasses import dataclass
from typing import Literal

from msgspec.structs import replace

from loom.schemas.auction import Award
from loom.schemas.envelope import Claim, Envelope, RecordVersion
from loom.schemas.record import TaskRecord

Standing = Literal["report", "over", "settle", "leave"]
NODE_LOST = "node_lost"


@dataclass(frozen=True)
class Claimed:
    """Write this record, then run."""

    record: TaskRecord
    attached: bool
    """Whether the run may be going on already."""
    record_version: RecordVersion | None = None
    """Of the record, once it is written."""
    superseded: Claim | None = None
    """A lower attempt that may still run on another host."""


@dataclass(frozen=True)
class Superseded:
    """This message has nothing left to do."""

    reason: str
    delegated: tuple[str, ...] = ()
    """What a run of an ended task has delegated: its results are not wanted any more."""
    ended: Claim | None = None
    """The attempt that the record of an ended task names: its run may still go on."""


def claim(record: TaskRecord, envelope: Envelope, award: Award, instance: str, stream_seq: int) -> Claimed | Superseded:
    """Decide whether this message may run its attempt.

    A higher attempt than the record's is taken. The same attempt on the same host is the same run, re-attached.
    The same attempt on another host, and any lower one, is a twin.
    """
    if record.ended:
        return Superseded("the task has ended", record.delegated, record.claim if record.claim.attempt else None)
    held = record.claim
    if envelope.attempt < held.attempt:
        return Superseded("a later attempt is running")
    if envelope.attempt == held.attempt and not is_same(held, award):
        return Superseded("the attempt runs on another host")
    mine = Claim(
        attempt=envelope.attempt,
        owner=award.owner,
        node_id=award.node_id,
        host_id=award.host_id,
        instance=instance,
        stream_seq=stream_seq,
    )
    superseded = held if may_still_run(held, envelope, award) else None
    return Claimed(replace(record, claim=mine), attached=envelope.attempt == held.attempt, superseded=superseded)


def is_same(held: Claim, award: Award) -> bool:
    """Return whether a claim and an award name the same node on the same host."""
    return (held.owner, held.host_id, held.node_id) == (award.owner, award.host_id, award.node_id)


def may_still_run(held: Claim, envelope: Envelope, award: Award) -> bool:
    """Return whether the attempt that a claim replaces may still run on another host than the award's.

    The last event of the attempt just before has come, unless its node was lost.
    """
    if not 0 < held.attempt < envelope.attempt or (held.owner, held.host_id) == (award.owner, award.host_id):
        return False
    reason = envelope.last_error
    return reason is None or reason.code == NODE_LOST or held.attempt != envelope.attempt - 1


def may_report(record: TaskRecord, attempt: int, instance: str, stream_seq: int) -> Standing:
    """Decide what a failed run's message may do, after reading the claim again.

    report: the claim is still this message's and this replica's. over: the task has ended, or a later attempt is
    claimed. settle: another message holds the attempt. leave: another replica works on this very message.
    """
    held = record.claim
    if record.ended or held.attempt > attempt:
        return "over"
    if held.attempt != attempt or held.stream_seq != stream_seq:
        return "settle"
    return "report" if held.instance == instance else "leave"
