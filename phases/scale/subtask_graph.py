"""The graph of a divided task, and its changes when subtasks end. Pure: every change returns a new plan."""

import base64
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b

from msgspec.structs import replace

from loom.phases.shared.inherited_ad import inherited_ad
from loom.phases.shared.scale_rule import PLAN_KEY
from loom.phases.shared.token_usage import total_tokens, total_usage, with_phase_usage, with_subtask_usage
from loom.schemas.auction import DESCRIPTION_BYTES
from loom.schemas.base import MAX_INPUTS_BYTES, cut_note, cut_utf8, encode
from loom.schemas.envelope import Envelope, Split
from loom.schemas.events import SubtaskEvent
from loom.schemas.plan import SplitPlan, Subtask
from loom.schemas.record import TaskRecord
from loom.schemas.task import TaskAd, TaskError

SYNTHESIS_SHARE = 0.2
"""Share of a budget that is reserved for the synthesis of the outputs."""
MIN_WEIGHT = 0.1
"""Weight of a trivial subtask in the division of the budget."""

_SHARED_LIMITS = frozenset({"budget_exceeded", "deadline_exceeded"})
"""Error codes of a subtask that become the parent's: budget and deadline are limits of both."""


def child_id(parent_id: str, subtask_id: str) -> str:
    """Return the task id of a subtask, which is the same in every process."""
    digest = blake2b(f"{parent_id}:{subtask_id}".encode(), digest_size=16).digest()
    return base64.b32encode(digest).decode().rstrip("=").lower()


def start_plan(envelope: Envelope, subtasks: Sequence[Subtask]) -> SplitPlan:
    """Return the plan of a task about to be parked, with its first subtasks running."""
    named = tuple(
        Subtask(
            id=subtask.id,
            description=subtask.description,
            domain=subtask.domain,
            dependencies=subtask.dependencies,
            estimated_complexity=subtask.estimated_complexity,
            child_id=child_id(envelope.task_id, subtask.id),
        )
        for subtask in subtasks
    )
    return advance(SplitPlan(parent_id=envelope.task_id, subtasks=named, envelope=envelope))


def keep_whole(envelope: Envelope, why: str) -> SplitPlan:
    """Return a plan without subtasks, which records that the task stays whole and why."""
    return SplitPlan(parent_id=envelope.task_id, state="done", subtasks=(), envelope=envelope, note=cut_note(why))


def with_newer_attempt(plan: SplitPlan, envelope: Envelope) -> SplitPlan:
    """Return the plan with `envelope` as its parked task if that is a newer attempt; otherwise the plan unchanged.

    The subtasks continue, and their outputs go to the newest attempt.
    """
    return (
        plan
        if envelope.attempt <= plan.envelope.attempt
        else replace(plan, envelope=with_planning_usage(plan, envelope))
    )


def with_planning_usage(plan: SplitPlan, envelope: Envelope) -> Envelope:
    """Return the envelope with the usage of its planning, unless it is counted already."""
    asked = plan.envelope.phase_usage.get("scale")
    return envelope if asked is None or "scale" in envelope.phase_usage else with_phase_usage(envelope, "scale", asked)


def advance(plan: SplitPlan) -> SplitPlan:
    """Return the plan with all ready subtasks running; state "joining" when all subtasks have succeeded.

    A subtask is ready when its dependencies have succeeded. The plan is done when a subtask has failed or no tokens are
    left.
    """
    if error := plan_error(plan):
        return replace(finish(plan), error=error)
    done = {subtask.id for subtask in plan.subtasks if subtask.state == "succeeded"}
    if len(done) == len(plan.subtasks):
        return replace(plan, state="joining")
    ready = {
        subtask.id for subtask in plan.subtasks if subtask.state == "waiting" and done.issuperset(subtask.dependencies)
    }
    grants = _grants(plan, ready)
    plan = replace(plan, subtasks=tuple(_started(subtask, grants) for subtask in plan.subtasks))
    error = plan_error(plan)
    return replace(finish(plan), error=error) if error else plan


def _started(subtask: Subtask, grants: Mapping[str, int | None]) -> Subtask:
    if subtask.id not in grants:
        return subtask
    grant = grants[subtask.id]
    if grant == 0:
        return replace(subtask, state="failed", error=TaskError(code="budget_exceeded", message="no tokens are left"))
    return replace(subtask, state="running", grant=grant)


def _grants(plan: SplitPlan, ready: Collection[str]) -> dict[str, int | None]:
    """Return subtask id -> tokens: the rest of the budget is shared by complexity among the waiting subtasks.

    The rest includes the tokens that ended subtasks have not used.
    """
    left = tokens_left(plan)
    if left is None or plan.envelope.budget is None:
        return dict.fromkeys(ready)
    lent = sum(max(0, (subtask.grant or 0) - subtask.tokens) for subtask in running_subtasks(plan))
    free = max(0.0, left - lent - plan.envelope.budget * SYNTHESIS_SHARE)
    weights = {
        subtask.id: MIN_WEIGHT + subtask.estimated_complexity for subtask in plan.subtasks if subtask.state == "waiting"
    }
    weight = sum(weights.values())
    return {name: int(free * weights[name] / weight) for name in ready}


def tokens_left(plan: SplitPlan) -> int | None:
    """Return the parent's budget minus the usage of its subtasks; None without a limit."""
    budget = plan.envelope.budget
    return None if budget is None else budget - sum(subtask.tokens for subtask in plan.subtasks)


def record_child(plan: SplitPlan, record: TaskRecord) -> SplitPlan:
    """Return the plan after the end of a subtask, given its record; a repeated call changes nothing.

    A failed subtask, or a spent budget, fails the plan. In a plan that is done, only the subtask's state changes.
    """
    subtasks = tuple(
        _with_child_result(subtask, record) if subtask.child_id == record.task_id else subtask
        for subtask in plan.subtasks
    )
    if subtasks == plan.subtasks:
        return plan
    updated = replace(plan, subtasks=subtasks)
    return advance(updated) if plan.state == "running" else updated


def _with_child_result(subtask: Subtask, record: TaskRecord) -> Subtask:
    if subtask.state != "running" or not record.ended or record.state in {"accepted", "running"}:
        return subtask
    result = record.to_result()
    return replace(
        subtask,
        state=record.state,
        error=_without_best_rejected(record.error),
        node_id=result.node_id,
        owner=result.owner,
        tokens=total_tokens(record),
        spent=total_usage(record),
        duration_s=record.lasted_s,
    )


def _without_best_rejected(error: TaskError | None) -> TaskError | None:
    """Return an error without the rejected answer, because a plan holds no outputs."""
    return replace(error, best_rejected=None) if error is not None else None


def plan_error(plan: SplitPlan) -> TaskError | None:
    """Return why the parent fails; None while it does not."""
    for subtask in plan.subtasks:
        if subtask.state in ("failed", "cancelled"):
            why = subtask.error.message if subtask.error else ""
            code = subtask.error.code if subtask.error else subtask.state
            if code in _SHARED_LIMITS:
                return TaskError(code=code, message=f"subtask {subtask.id}: {why}"[:2000])
            return TaskError(code="subtask_failed", message=f"subtask {subtask.id} ended with {code}: {why}"[:2000])
    left = tokens_left(plan)
    if left is not None and left <= 0:
        return TaskError(code="budget_exceeded", message="the subtasks have used all tokens of the budget")
    return None


def running_subtasks(plan: SplitPlan) -> list[Subtask]:
    """Return the subtasks that have started and not ended, in the order of the plan."""
    return [subtask for subtask in plan.subtasks if subtask.state == "running"]


def unblocked_by(plan: SplitPlan, child_id: str) -> list[Subtask]:
    """Return the running subtasks that depend on the given child."""
    ended = {subtask.id for subtask in plan.subtasks if subtask.child_id == child_id}
    return [subtask for subtask in running_subtasks(plan) if not ended.isdisjoint(subtask.dependencies)]


def finish(plan: SplitPlan) -> SplitPlan:
    """Return the plan as done, whatever the state of its subtasks."""
    return replace(plan, state="done")


def child_envelope(plan: SplitPlan, subtask: Subtask, outputs: Mapping[str, str], now: float) -> Envelope:
    """Return the first envelope of a subtask.

    Args:
        outputs: Subtask id -> output, for each dependency; inputs of the parent are added.
        now: Server time, seconds since the epoch.
    """
    parent = plan.envelope
    given = parent.split.inputs if parent.split else {}
    ad = TaskAd(
        task_id=subtask.child_id or child_id(parent.task_id, subtask.id),
        domain=subtask.domain or parent.domain,
        description=subtask.description,
        estimated_complexity=subtask.estimated_complexity,
        priority=parent.priority,
        token_budget=subtask.grant,
        timeout_s=max(0.001, min(86_400.0, parent.deadline - now)),
        context={key: value for key, value in parent.ad.context.items() if key != PLAN_KEY},
    )
    ad = inherited_ad(ad, parent.ad)
    split = Split(
        parent=parent.task_id,
        depth=parent.depth + 1,
        subtask=subtask.id,
        grant=subtask.grant,
        deadline=parent.deadline,
        inputs=fit_inputs({**given, **{name: outputs.get(name, "") for name in subtask.dependencies}}),
    )
    return Envelope(
        ad=ad,
        submitter=parent.submitter,
        split=split,
        deadline=parent.deadline,
        budget=subtask.grant,
        trace=parent.trace,
    )


def begun_event(plan: SplitPlan, subtask: Subtask, now: float) -> SubtaskEvent:
    """Return the event for clients that a subtask has started."""
    return SubtaskEvent(
        parent_id=plan.parent_id,
        child_id=subtask.child_id or child_id(plan.parent_id, subtask.id),
        subtask=subtask.id,
        state="begun",
        description=cut_utf8(subtask.description, DESCRIPTION_BYTES)[0],
        at=now,
    )


def ended_event(plan: SplitPlan, record: TaskRecord, now: float) -> SubtaskEvent | None:
    """Return the event for clients that the subtask of an ended record has ended; None for a task of another plan."""
    subtask = next((subtask for subtask in plan.subtasks if subtask.child_id == record.task_id), None)
    if subtask is None or record.state in {"accepted", "running"}:
        return None
    result = record.to_result()
    return replace(
        begun_event(plan, subtask, record.ended_at or now),
        state="ended",
        child_state=record.state,
        node_id=result.node_id,
        owner=result.owner,
        error=result.error.code if result.error else "",
    )


def synthesis_envelope(plan: SplitPlan, outputs: Mapping[str, str]) -> Envelope:
    """Return the parent's envelope with all outputs, in the order of the plan, for the synthesis by its node."""
    inputs = fit_inputs({subtask.id: outputs.get(subtask.id, "") for subtask in plan.subtasks})
    return replace(with_subtask_usage(plan.envelope, plan.subtasks), inputs=inputs)


def fit_inputs(inputs: Mapping[str, str]) -> dict[str, str]:
    """Return the inputs, with the longest ones cut so that all of them fit into an envelope."""
    free_bytes, kept = MAX_INPUTS_BYTES, {}
    for count, name in enumerate(sorted(inputs, key=lambda name: len(inputs[name]))):
        kept[name], _ = cut_utf8(inputs[name], free_bytes // (len(inputs) - count))
        free_bytes -= len(encode(kept[name]))
    return {name: kept[name] for name in inputs}
