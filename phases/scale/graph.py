"""The graph of a divided task and what a child's end does to it. Pure: every change gives a new plan."""

import base64
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from msgspec.structs import replace

from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope, Split, SplitPlan, Subtask, TaskRecord
from loom.schemas.task import RunResult, TaskAd, TaskError
from loom.schemas.wire import MAX_INPUTS_BYTES, cut_utf8, encode

SYNTHESIS_SHARE = 0.2
"""Part of a budget kept for putting the outputs together."""
LEAST_WEIGHT = 0.1
"""Even a trivial subtask gets a part of the budget."""
PLAN = "plan"
"""Key of the ad's context under which a client may give the plan itself, or `true` to have one made."""


def child_id(parent_id: str, subtask_id: str) -> str:
    """Return the task id of a subtask: the same whoever computes it."""
    digest = blake2b(f"{parent_id}:{subtask_id}".encode(), digest_size=16).digest()
    return base64.b32encode(digest).decode().rstrip("=").lower()


def may_split(envelope: Envelope, config: ClusterConfig) -> bool:
    """Return whether the task is to be divided: it asks for it or is hard, and is not divided too deeply yet."""
    limits = envelope.ad.limits
    deepest, hard = config.max_depth, config.mitosis_threshold
    if limits is not None:
        deepest = deepest if limits.max_depth is None else min(deepest, limits.max_depth)
        hard = hard if limits.mitosis_threshold is None else max(hard, limits.mitosis_threshold)
    if envelope.depth >= deepest or envelope.spec is None:
        return False
    return PLAN in envelope.ad.context or envelope.spec.complexity > hard


def begin(envelope: Envelope, subtasks: Sequence[Subtask]) -> SplitPlan:
    """Return the plan of a task about to be parked, with the first subtasks running."""
    named = tuple(
        replace(part, state="waiting", child_id=child_id(envelope.task_id, part.id), error=None, tokens=0)
        for part in subtasks
    )
    return advance(SplitPlan(parent_id=envelope.task_id, subtasks=named, envelope=envelope))


def advance(plan: SplitPlan) -> SplitPlan:
    """Return the plan with every subtask running whose dependencies have succeeded; joining when all have."""
    done = {part.id for part in plan.subtasks if part.state == "succeeded"}
    if len(done) == len(plan.subtasks):
        return replace(plan, state="joining")
    begun = [part for part in plan.subtasks if part.state == "waiting" and done.issuperset(part.dependencies)]
    grants = _grants(plan, begun)
    subtasks = tuple(
        replace(part, state="running", grant=grants[part.id]) if part.id in grants else part for part in plan.subtasks
    )
    return replace(plan, subtasks=subtasks)


def _grants(plan: SplitPlan, begun: Sequence[Subtask]) -> dict[str, int | None]:
    """Share what is left of the budget among all that has not begun, by how hard each is; what is unused comes back."""
    left = tokens_left(plan)
    if left is None:
        return {part.id: None for part in begun}
    lent = sum(max(0, (part.grant or 0) - part.tokens) for part in plan.subtasks if part.state == "running")
    free = max(0, left - lent) * (1 - SYNTHESIS_SHARE)
    weights = {part.id: LEAST_WEIGHT + part.estimated_complexity for part in plan.subtasks if part.state == "waiting"}
    total = sum(weights.values())
    return {part.id: max(1, int(free * weights[part.id] / total)) for part in begun}


def tokens_left(plan: SplitPlan) -> int | None:
    """Return the parent's budget less what its subtasks have used; None when there is no limit."""
    budget = plan.envelope.budget
    return None if budget is None else budget - sum(part.tokens for part in plan.subtasks)


def note(plan: SplitPlan, record: TaskRecord) -> SplitPlan:
    """Return the plan after the child of that (ended) record; told again, nothing changes.

    A subtask that failed fails the plan, and so does a budget that is spent.
    """
    if plan.state != "running":
        return plan
    subtasks = tuple(_ended(part, record) if part.child_id == record.task_id else part for part in plan.subtasks)
    if subtasks == plan.subtasks:
        return plan
    plan = replace(plan, subtasks=subtasks)
    return replace(plan, state="done") if failure(plan) else advance(plan)


def _ended(part: Subtask, record: TaskRecord) -> Subtask:
    if part.state != "running" or not record.ended or record.state in {"accepted", "running"}:
        return part
    result = record.envelope.result or RunResult()
    failed = sum(tried.tokens for tried in record.envelope.tried)
    return replace(
        part,
        state=record.state,
        error=None if record.state == "succeeded" else record.envelope.error,
        node_id=record.envelope.award.node_id if record.envelope.award else None,
        tokens=result.tokens + failed,
        duration_s=max(0.0, (record.ended_at or record.admitted_at) - record.admitted_at),
    )


def failure(plan: SplitPlan) -> TaskError | None:
    """Return why the parent fails; None while it does not."""
    for part in plan.subtasks:
        if part.state in ("failed", "cancelled"):
            why = part.error.message if part.error else ""
            code = part.error.code if part.error else part.state
            if code == "budget_exceeded":
                return TaskError(code=code, message=f"subtask {part.id} spent its part of the budget: {why}"[:2000])
            return TaskError(code="subtask_failed", message=f"subtask {part.id} ended with {code}: {why}"[:2000])
    left = tokens_left(plan)
    if left is not None and left < 0:
        return TaskError(code="budget_exceeded", message=f"the subtasks used {-left} tokens more than the budget")
    return None


def running(plan: SplitPlan) -> list[Subtask]:
    """Return the subtasks that have begun and not ended, in the order of the plan."""
    return [part for part in plan.subtasks if part.state == "running"]


def finish(plan: SplitPlan) -> SplitPlan:
    """Return the plan as over, whatever its subtasks did."""
    return replace(plan, state="done")


def child_of(plan: SplitPlan, part: Subtask, outputs: Mapping[str, str], now: float) -> Envelope:
    """Return the first envelope of a subtask.

    Args:
        outputs: subtask id -> what came out, for each of its dependencies.
        now: Server time, seconds since the epoch.
    """
    parent = plan.envelope
    ad = TaskAd(
        task_id=part.child_id or child_id(parent.task_id, part.id),
        domain=part.domain or parent.domain,
        description=part.description,
        estimated_complexity=part.estimated_complexity,
        priority=parent.priority,
        token_budget=part.grant,
        timeout_s=max(0.001, min(86_400.0, parent.deadline - now)),
        limits=parent.ad.limits,
        context={key: value for key, value in parent.ad.context.items() if key != PLAN},
    )
    split = Split(
        parent=parent.task_id,
        depth=parent.depth + 1,
        subtask=part.id,
        grant=part.grant,
        deadline=parent.deadline,
        inputs=fitting({name: outputs.get(name, "") for name in part.dependencies}),
    )
    return Envelope(ad=ad, split=split, deadline=parent.deadline, budget=part.grant, trace=parent.trace)


def joined(plan: SplitPlan, outputs: Mapping[str, str]) -> Envelope:
    """Return the parent's envelope with all outputs, in the order of the plan, for the awarded node to synthesise."""
    left = tokens_left(plan)
    inputs = fitting({part.id: outputs.get(part.id, "") for part in plan.subtasks})
    return replace(plan.envelope, inputs=inputs, budget=None if left is None else max(0, left))


def fitting(inputs: Mapping[str, str]) -> dict[str, str]:
    """Return the inputs, the longest ones cut so that all together fit on an envelope."""
    room, kept = MAX_INPUTS_BYTES, {}
    for count, name in enumerate(sorted(inputs, key=lambda name: len(inputs[name]))):
        kept[name], _ = cut_utf8(inputs[name], room // (len(inputs) - count))
        room -= len(encode(kept[name]))
    return {name: kept[name] for name in inputs}
