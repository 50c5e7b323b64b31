"""The token usage of a task: its attempts, the phases' calls to a model, and its subtasks. Pure."""

from collections.abc import Iterable

from msgspec.structs import replace

from loom.schemas.base import total
from loom.schemas.envelope import Envelope, Phase
from loom.schemas.plan import Subtask
from loom.schemas.record import TaskRecord
from loom.schemas.task import PhaseUsage, RunResult

SHARE_BEFORE_RUN = 0.25
"""Share of a budget that one phase before EXECUTE may use for a call to a model."""


def budget_before_run(envelope: Envelope) -> int | None:
    """Return the tokens that a phase before EXECUTE may use for a call to a model; None without a limit."""
    return None if envelope.budget is None else int(envelope.budget * SHARE_BEFORE_RUN)


def with_phase_usage(envelope: Envelope, phase: Phase, usage: PhaseUsage) -> Envelope:
    """Return the envelope with the usage of a phase's calls added, and subtracted from its budget."""
    if not usage.requests:
        return envelope
    before = envelope.phase_usage.get(phase, PhaseUsage())
    return replace(
        envelope,
        phase_usage={**envelope.phase_usage, phase: before.plus(usage)},
        budget=None if envelope.budget is None else max(0, envelope.budget - usage.tokens),
    )


def total_tokens(record: TaskRecord) -> int:
    """Return all tokens of an ended task: attempts, subtasks and the phases' calls.

    A task with a granted budget counts at least what is missing from it, because a lost run reports no tokens.
    """
    envelope = record.envelope
    used = total(record.used.tokens, *(usage.tokens for usage in envelope.phase_usage.values()))
    granted = envelope.split.grant if envelope.split else None
    return used if granted is None or envelope.budget is None else max(used, granted - envelope.budget)


def total_usage(record: TaskRecord) -> RunResult:
    """Return the same tokens with the costs; tokens of unknown kind count as prompt tokens."""
    used = record.used
    estimated = any(usage.estimated for usage in record.envelope.phase_usage.values())
    completion = total(
        used.completion_tokens, *(usage.completion_tokens for usage in record.envelope.phase_usage.values())
    )
    return RunResult(
        prompt_tokens=max(0, total_tokens(record) - completion),
        completion_tokens=completion,
        estimated_usage=used.estimated_usage or estimated,
        usd=used.usd,
    )


def with_subtask_usage(envelope: Envelope, subtasks: Iterable[Subtask]) -> Envelope:
    """Return a parked task's envelope with the usage of its subtasks added, and subtracted from its budget."""
    spent, tokens = envelope.spent, 0
    for subtask in subtasks:
        spent, tokens = spent.usage_with(subtask.spent), tokens + subtask.tokens
    budget = envelope.budget
    return replace(envelope, spent=spent, budget=None if budget is None else max(0, budget - tokens))
