"""The fence of an attempt: the task record alone decides which message may run it. Pure."""

from dataclasses import dataclass
from typing import Literal

from msgspec.structs import replace

from loom.schemas.auction import Award
from loom.schemas.envelope import Claim, Envelope, RecordVersion
from loom.schemas.record import TaskRecord

Ownership = Literal["own", "over", "other_message", "other_replica"]
"""own: the claim is still this message's and this replica's. over: the task has ended, or a later attempt is claimed.
other_message: another message holds the attempt. other_replica: another replica handles this very message."""
NODE_LOST = "node_lost"


@dataclass(frozen=True)
class Claimed:
    """The attempt may run once `record` is stored."""

    record: TaskRecord
    attached: bool
    """Whether the run may already be in progress."""
    record_version: RecordVersion | None = None
    """Version of the record after the write."""
    superseded: Claim | None = None
    """Claim of a lower attempt that may still run on another host."""


@dataclass(frozen=True)
class Superseded:
    """The message has nothing left to do."""

    reason: str
    delegated: tuple[str, ...] = ()
    """Tasks that a run of the ended task has delegated; their results are not needed any more."""
    ended: Claim | None = None
    """Claim in the record of the ended task: its run may still be in progress."""


def claim(record: TaskRecord, envelope: Envelope, award: Award, instance: str, stream_seq: int) -> Claimed | Superseded:
    """Decide whether a message may run its attempt.

    An attempt higher than the record's is claimed. The same attempt on the same host is the same run, reattached.
    The same attempt on another host is a duplicate, as is any lower attempt.
    """
    if record.ended:
        return Superseded("the task has ended", record.delegated, record.claim if record.claim.attempt else None)
    held = record.claim
    if envelope.attempt < held.attempt:
        return Superseded("a later attempt is running")
    if envelope.attempt == held.attempt and not is_same_node(held, award):
        return Superseded("the attempt runs on another host")
    new = Claim(
        attempt=envelope.attempt,
        owner=award.owner,
        node_id=award.node_id,
        host_id=award.host_id,
        instance=instance,
        stream_seq=stream_seq,
    )
    superseded = held if may_still_run(held, envelope, award) else None
    return Claimed(replace(record, claim=new), attached=envelope.attempt == held.attempt, superseded=superseded)


def is_same_node(held: Claim, award: Award) -> bool:
    """Return whether a claim and an award name the same node on the same host."""
    return (held.owner, held.host_id, held.node_id) == (award.owner, award.host_id, award.node_id)


def may_still_run(held: Claim, envelope: Envelope, award: Award) -> bool:
    """Return whether the attempt of a replaced claim may still run on another host than the award's.

    The last event of the attempt just before has arrived, unless its node was lost.
    """
    if not 0 < held.attempt < envelope.attempt or (held.owner, held.host_id) == (award.owner, award.host_id):
        return False
    reason = envelope.last_error
    return reason is None or reason.code == NODE_LOST or held.attempt != envelope.attempt - 1


def ownership(record: TaskRecord, attempt: int, instance: str, stream_seq: int) -> Ownership:
    """Return who owns an attempt, from a record that was read after the claim.

    Args:
        record: The task's record, as just read.
        attempt: Number of the attempt that this message runs.
        instance: This replica.
        stream_seq: Stream sequence of this message.
    """
    held = record.claim
    if record.ended or held.attempt > attempt:
        return "over"
    if held.attempt != attempt or held.stream_seq != stream_seq:
        return "other_message"
    return "own" if held.instance == instance else "other_replica"
