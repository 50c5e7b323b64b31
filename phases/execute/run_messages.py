"""The run request that an envelope makes, and the envelope that a run's last event makes. Pure."""

from msgspec.structs import replace

from loom.bus.host_directory import HostKey
from loom.schemas.auction import Award
from loom.schemas.base import MAX_CONTENT_BYTES, cut_utf8
from loom.schemas.envelope import Envelope
from loom.schemas.run import RunEvent, RunRequest
from loom.schemas.task import RunResult, TaskError


def request_for(envelope: Envelope, award: Award, now: float) -> RunRequest:
    """Return the run request for the awarded node.

    Args:
        envelope: The task's.
        award: Names the node.
        now: Server time, seconds since the epoch.
    """
    ad = envelope.ad
    return RunRequest(
        task_id=ad.task_id,
        attempt=envelope.attempt,
        node_id=award.node_id,
        domain=envelope.domain,
        description=ad.description,
        complexity=envelope.spec.complexity if envelope.spec else 0.5,
        context=ad.context,
        inputs={**(envelope.split.inputs if envelope.split else {}), **envelope.inputs},
        accept=ad.accept,
        tools=ad.required_tools,
        tools_allowed=ad.tools_allowed,
        token_budget=envelope.budget,
        remaining_s=max(0.0, envelope.deadline - now),
        deadline=envelope.deadline,
        priority=ad.priority,
        depth=envelope.depth,
        trace=envelope.trace,
    )


def host_of(award: Award) -> HostKey:
    """Return the host that won the auction."""
    return HostKey(award.owner, award.host_id)


def error_of(last: RunEvent, award: Award) -> TaskError:
    """Return the error that a run has ended with."""
    if last.error is not None:
        # EVALUATE alone decides which rejected answer is the best.
        return replace(last.error, node_id=award.node_id, best_rejected=None)
    if last.kind == "rejected" and last.code == "busy":
        return TaskError(code="node_busy", message="the node's slots and backlog are full", node_id=award.node_id)
    if last.kind == "rejected":
        return TaskError(code="node_lost", message="the host does not have this node any more", node_id=award.node_id)
    return TaskError(code="agent_failed", message="the run ended without a result", node_id=award.node_id)


def with_result(envelope: Envelope, result: RunResult | None) -> Envelope:
    """Return the envelope with a run's result, whose tokens are taken off the budget.

    The content is cut to what a message may carry, because a host may send more.
    """
    if result is None:
        return replace(envelope, result=None)
    content, cut = cut_utf8(result.content, MAX_CONTENT_BYTES)
    if cut:
        result = replace(result, content=content, truncated=True)
    return replace(envelope, result=result, budget=tokens_left(envelope, result))


def tokens_left(envelope: Envelope, result: RunResult) -> int | None:
    """Return the tokens that the task has left after a run, at least 0; None: unlimited."""
    return None if envelope.budget is None else max(0, envelope.budget - result.tokens)
