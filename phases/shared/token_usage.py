"""What a task has used: in its attempts, in the phases' own questions, and in its parts. Pure."""

from collections.abc import Iterable

from msgspec.structs import replace

from loom.schemas.base import total
from loom.schemas.envelope import Envelope, Phase
from loom.schemas.plan import Subtask
from loom.schemas.record import TaskRecord
from loom.schemas.task import PhaseUsage, RunResult

BEFORE_THE_RUN = 0.25
"""Share of a budget that the questions of the phases before the run may take at a time."""


def before_the_run(envelope: Envelope) -> int | None:
    """Return the tokens a phase before EXECUTE may ask a model for; None when there is no limit."""
    return None if envelope.budget is None else int(envelope.budget * BEFORE_THE_RUN)


def charged(envelope: Envelope, phase: Phase, usage: PhaseUsage) -> Envelope:
    """Return the envelope with a phase's questions to a model counted, and their tokens taken off its budget."""
    if not usage.requests:
        return envelope
    before = envelope.phase_usage.get(phase, PhaseUsage())
    return replace(
        envelope,
        phase_usage={**envelope.phase_usage, phase: before.plus(usage)},
        budget=None if envelope.budget is None else max(0, envelope.budget - usage.tokens),
    )


def tokens_of(record: TaskRecord) -> int:
    """Return the tokens an ended task has taken in all: attempts, parts, the phases' questions.

    Where it was granted a budget, it is at least what is missing of that: a run that was lost reports no tokens.
    """
    envelope = record.envelope
    used = total(record.used.tokens, *(usage.tokens for usage in envelope.phase_usage.values()))
    granted = envelope.split.grant if envelope.split else None
    return used if granted is None or envelope.budget is None else max(used, granted - envelope.budget)


def used_in_all(record: TaskRecord) -> RunResult:
    """Return the same tokens with the money; those that no completion is known of count as prompt tokens."""
    used = record.used
    estimated = any(usage.estimated for usage in record.envelope.phase_usage.values())
    completion = total(
        used.completion_tokens, *(usage.completion_tokens for usage in record.envelope.phase_usage.values())
    )
    return RunResult(
        prompt_tokens=max(0, tokens_of(record) - completion),
        completion_tokens=completion,
        estimated_usage=used.estimated_usage or estimated,
        usd=used.usd,
    )


def with_parts(envelope: Envelope, parts: Iterable[Subtask]) -> Envelope:
    """Return a divided task's envelope, as it was parked, with what its subtasks have used taken off its budget."""
    spent, tokens = envelope.spent, 0
    for part in parts:
        spent, tokens = spent.usage_with(part.spent), tokens + part.tokens
    budget = envelope.budget
    return replace(envelope, spent=spent, budget=None if budget is None else max(0, budget - tokens))
