"""PhaseEvents for AmoebaLoop of loom-agent 0.6: the decisions of the phases, derived from a task's record."""

import asyncio
from collections.abc import Sequence

from msgspec.structs import replace

from loom.bus.logs.logger import get_logger
from loom.bus.task_client import TaskHandle
from loom.schemas.envelope import Envelope, FailedAttempt, Hop, Phase
from loom.schemas.errors import LoomError
from loom.schemas.events import PhaseEvent
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import success_signal
from loom.schemas.record import TaskRecord

log = get_logger()

REWARDED = frozenset({"node_lost", "agent_failed", "rejected_result", "deadline_exceeded"})
"""Codes of failures with a reward for the node."""
MOST_READS = 8
"""Most reads of the record for one attempt that it does not contain yet."""
READ_S = 1.0
"""Longest wait for the record, in seconds."""


class PhaseReports:
    """Reads the record of one task after its events, and reports each phase once for each attempt."""

    def __init__(self, handle: TaskHandle) -> None:
        self._handle = handle
        self.subtasks: set[str] = set()
        """Ids of the subtasks so far."""
        self._reported: set[tuple[int, Phase]] = set()
        self._attempt = 0
        """The newest reported attempt."""
        self._awaited = 0
        """The attempt of `_reads`."""
        self._reads = 0

    async def of_attempt(self, attempt: int) -> list[PhaseEvent]:
        """Return the events of the phases before EXECUTE for a running attempt; empty after the first time."""
        if attempt != self._awaited:
            self._awaited, self._reads = attempt, 0
        if attempt <= self._attempt or self._reads >= MOST_READS:
            return []
        self._reads += 1
        record = await self._read()
        if record is None or record.envelope.attempt < attempt:
            return []  # the claim of the attempt is being written
        self._attempt = attempt
        return self._new(record, running=attempt)

    async def of_ended(self) -> list[PhaseEvent]:
        """Return the remaining events of an ended task, its evaluation included."""
        record = await self._read()
        return [] if record is None else self._new(record)

    async def _read(self) -> TaskRecord | None:
        try:
            async with asyncio.timeout(READ_S):
                return await self._handle.record()
        except (LoomError, TimeoutError) as error:  # the task continues, and its progress must not wait for long
            log.info("phases_not_reported", task_id=self._handle.task_id, reason=type(error).__name__)
            self._reads = MOST_READS
            return None

    def _new(self, record: TaskRecord, *, running: int | None = None) -> list[PhaseEvent]:
        """Return the events that were not reported; of the running attempt only those before its run."""
        new = [
            event
            for event in phase_events(record, subtasks=len(self.subtasks))
            if (event.attempt, event.name) not in self._reported and (running is None or _precedes(event, running))
        ]
        self._reported.update((event.attempt, event.name) for event in new)
        return new


def phase_events(record: TaskRecord, *, subtasks: int = 0) -> list[PhaseEvent]:
    """Return an event for each phase of each attempt, in the order of their last hops.

    Only what the record still holds is reported: of an attempt before the last one the node and why it failed.
    """
    envelope = record.envelope
    hops = list(envelope.hops)
    if record.ended_at is not None and hops:  # EVALUATE ends a task without another hop
        hops.append(
            Hop(
                phase="evaluate",
                instance="",
                started=hops[-1].finished,
                finished=max(record.ended_at, hops[-1].finished),
                step=envelope.step,
            )
        )
    attempts = _attempts(hops, envelope.attempt)
    seconds: dict[tuple[int, Phase], float] = {}
    for hop, attempt in zip(hops, attempts, strict=True):
        before = seconds.pop((attempt, hop.phase), 0.0)  # MATCH and SCALE may have handled the task several times
        seconds[attempt, hop.phase] = before + hop.finished - hop.started
    return [
        _event(phase, attempt, took, record, subtasks)
        for (attempt, phase), took in _with_scale(seconds, envelope).items()
    ]


def _with_scale(seconds: dict[tuple[int, Phase], float], envelope: Envelope) -> dict[tuple[int, Phase], float]:
    """Return the seconds with those of SCALE after each award: loom-agent 0.6 had every task pass that phase."""
    all_seconds: dict[tuple[int, Phase], float] = {}
    for (attempt, phase), took in seconds.items():
        all_seconds[attempt, phase] = took
        is_awarded = attempt < envelope.attempt or envelope.award is not None
        if phase == "match" and is_awarded and (attempt, "scale") not in seconds:
            all_seconds[attempt, "scale"] = 0.0
    return all_seconds


def adapted(profile: NodeProfile, attempt: int) -> PhaseEvent:
    """Return the event of ADAPT: the evidence about a node after the reward."""
    return PhaseEvent(
        name="adapt",
        attempt=max(attempt, 1),
        node_id=profile.node_id,
        owner=profile.owner,
        success_rate=profile.success_rate,
        total_tasks=profile.total_tasks,
    )


def _precedes(event: PhaseEvent, attempt: int) -> bool:
    """Return whether the event precedes the run of `attempt`: the record may be newer than the progress."""
    return event.attempt < attempt or (event.attempt == attempt and event.name not in ("execute", "evaluate"))


def _attempts(hops: Sequence[Hop], last: int) -> list[int]:
    """Return the attempt of each hop: only EVALUATE starts another one, and the last hop is of the last attempt."""
    begun, counted = 0, []
    for hop in hops:
        counted.append(begun)
        begun += hop.phase == "evaluate"
    return [max(1, last - counted[-1] + each) for each in counted]


def _event(phase: Phase, attempt: int, seconds: float, record: TaskRecord, subtasks: int) -> PhaseEvent:
    envelope = record.envelope
    event = PhaseEvent(name=phase, attempt=attempt, duration_ms=round(seconds * 1000))
    if phase == "sense" and envelope.spec is not None:
        spec = envelope.spec
        domains = spec.domains
        return replace(event, complexity=spec.complexity, domain=domains[0], domains=domains, method=spec.method)
    if phase == "scale":
        return replace(event, subtasks=subtasks)
    if attempt < envelope.attempt:
        tried = next((each for each in envelope.failed_attempts if each.attempt == attempt), None)
        return event if tried is None else _of_tried(event, tried)
    return _of_last(event, record)


def _of_tried(event: PhaseEvent, tried: FailedAttempt) -> PhaseEvent:
    """Return an event of a failed attempt that another one followed, with all its fields."""
    if event.name == "match":
        return replace(event, node_id=tried.node_id, owner=tried.owner)
    event = replace(event, node_id=tried.node_id, owner=tried.owner, error=tried.code)
    return replace(event, tokens=tried.tokens) if event.name == "execute" else replace(event, reward=0.0)


def _of_last(event: PhaseEvent, record: TaskRecord) -> PhaseEvent:
    """Return an event of the last attempt with all its fields."""
    envelope, award = record.envelope, record.envelope.award
    if award is not None:
        event = replace(event, node_id=award.node_id, owner=award.owner)
    if event.name == "match":
        return event if award is None else replace(event, score=award.score, bids=award.bids)
    error = envelope.error.code if envelope.error and record.state != "succeeded" else ""
    if event.name == "execute":
        tokens = envelope.result.tokens if envelope.result else 0
        return replace(event, tokens=tokens, error=error)
    return replace(event, score=record.score, reward=_reward(record, error), error=error)


def _reward(record: TaskRecord, error: str) -> float | None:
    """Return the reward of the last attempt; None if there was none."""
    envelope = record.envelope
    if error or envelope.result is None:
        return 0.0 if envelope.award and error in REWARDED else None
    run = envelope.result
    return success_signal(envelope.ad, run.tokens, run.tool_errors).total
