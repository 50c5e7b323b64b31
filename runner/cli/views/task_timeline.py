"""The way of a task through the phases, from its record. No I/O.

A record holds hops without their attempts, and the award of the last attempt only. Earlier attempts are in the failed
attempts of its envelope and, while the task runs, in the rewards of the failures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from loom.schemas.envelope import MAX_HOPS, Envelope, Hop, Phase
from loom.schemas.identity import JUDGE, RULES
from loom.schemas.learning.reward import Reward
from loom.schemas.record import TaskRecord

AFTER: dict[Phase, Phase] = {
    "sense": "match",
    "match": "scale",
    "scale": "execute",
    "execute": "evaluate",
    "evaluate": "match",
    "adapt": "match",
}
"""Whose turn it is after a hop."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One phase's turn at the task."""

    phase: str
    instance: str
    attempt: int
    at_s: float
    """When it began, seconds after the task was submitted."""
    waited_s: float | None
    """Between the end of the turn before and its own start; None when that is not known."""
    worked_s: float
    after_gap: bool = False
    """Whether turns before it have been forgotten."""


@dataclass(frozen=True, kw_only=True)
class Try:
    """One attempt: the node, and what came of it."""

    attempt: int
    node: str
    """As people write it."""
    outcome: str
    """`succeeded`, `running`, or the code of an error."""
    reason: str = ""
    """Message of the error."""
    tokens: int = 0
    duration_s: float = 0.0


def submitted_at(record: TaskRecord) -> float:
    """Return when the task was submitted, server time; a subtask begins with its admission."""
    envelope = record.envelope
    return record.admitted_at if envelope.split else envelope.deadline - envelope.ad.timeout_s


def turns(record: TaskRecord) -> list[Turn]:
    """Return the turns of the phases, in order.

    EVALUATE ends a task without a hop: its last turn is reckoned from the end of the hop before, waiting included.
    So is that of the phase which had a task when it was cancelled.
    """
    envelope, start = record.envelope, submitted_at(record)
    before, phase_turns = start, []
    gap = _gap(envelope.hops)
    for index, (hop, attempt) in enumerate(zip(envelope.hops, attempts(envelope), strict=True)):
        phase_turns.append(
            Turn(
                phase=hop.phase,
                instance=hop.instance,
                attempt=attempt,
                at_s=max(0.0, hop.started - start),
                waited_s=None if index == gap else max(0.0, hop.started - before),
                worked_s=max(0.0, hop.finished - hop.started),
                after_gap=index == gap,
            )
        )
        before = hop.finished
    if record.ended_at is not None and envelope.hops:
        worked = max(0.0, record.ended_at - before)
        phase_turns.append(
            Turn(
                phase="evaluate" if record.state != "cancelled" else AFTER[envelope.hops[-1].phase],
                instance="",
                attempt=envelope.attempt,
                at_s=max(0.0, before - start),
                waited_s=None,
                worked_s=worked,
            )
        )
    return phase_turns


def attempts(envelope: Envelope) -> list[int]:
    """Return which attempt each hop belongs to: EVALUATE handing to MATCH begins a new one."""
    gap = _gap(envelope.hops) or 0
    early, late = envelope.hops[:gap], envelope.hops[gap:]
    on_its_way_back = bool(late) and late[-1].phase == "evaluate"
    first = envelope.attempt - _begun(late) - on_its_way_back
    return [1 + _begun(early[: n + 1]) for n in range(len(early))] + [
        max(1, first + _begun(late[: n + 1])) for n in range(len(late))
    ]


def _begun(hops: Sequence[Hop]) -> int:
    """How many attempts begin within `hops`."""
    return sum(_sent_back(before, after) for before, after in pairwise(hops))


def _sent_back(before: Hop, after: Hop) -> bool:
    return before.phase == "evaluate" and after.phase == "match"


def _gap(hops: Sequence[Hop]) -> int | None:
    """Where an envelope dropped hops: the first one after them."""
    middle = MAX_HOPS // 2
    if len(hops) < MAX_HOPS or hops[middle].step == hops[middle - 1].step + 1:
        return None
    return middle


def tries(record: TaskRecord, rewards: Sequence[Reward]) -> list[Try]:
    """Return the attempts that are known of, in order."""
    known: dict[int, Try] = {}
    for failed in record.envelope.failed_attempts:
        known[failed.attempt] = Try(
            attempt=failed.attempt,
            node=failed.node,
            outcome=failed.code,
            reason=failed.message,
            tokens=failed.tokens,
            duration_s=failed.duration_s,
        )
    for reward in rewards:
        if reward.source in (RULES, JUDGE) and reward.attempt not in known:
            outcome = reward.reason or "succeeded"
            known[reward.attempt] = Try(
                attempt=reward.attempt,
                node=reward.node,
                outcome=outcome,
                tokens=reward.tokens,
                duration_s=reward.seconds,
            )
    last = _last_try(record)
    if last is not None and last.attempt not in known:
        known[last.attempt] = last
    return [known[number] for number in sorted(known)]


def _last_try(record: TaskRecord) -> Try | None:
    envelope, claim = record.envelope, record.claim
    if not claim.attempt:
        return None
    error, result = None, envelope.result
    outcome = "running"
    if record.ended:
        error, outcome = envelope.error, "succeeded"
    elif claim.attempt < envelope.attempt:
        error = envelope.last_error
    return Try(
        attempt=claim.attempt,
        node=claim.node,
        outcome=error.code if error else outcome,
        reason=error.message if error else "",
        tokens=result.tokens if result else 0,
        duration_s=result.duration_s if result else 0.0,
    )
