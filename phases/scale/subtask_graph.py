"""The graph of a divided task and what a child's end does to it. Pure: every change gives a new plan."""

import base64
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b

from msgspec.structs import replace

from loom.phases.shared.division import PLAN
from loom.phases.shared.inherited_ad import as_part
from loom.phases.shared.token_usage import charged, tokens_of, used_in_all, with_parts
from loom.schemas.auction import DESCRIPTION_BYTES
from loom.schemas.base import MAX_INPUTS_BYTES, cut_note, cut_utf8, encode
from loom.schemas.envelope import Envelope, Split
from loom.schemas.events import SubtaskEvent
from loom.schemas.plan import SplitPlan, Subtask
from loom.schemas.record import TaskRecord
from loom.schemas.task import TaskAd, TaskError

SYNTHESIS_SHARE = 0.2
"""Part of a budget kept for putting the outputs together."""
LEAST_WEIGHT = 0.1
"""Even a trivial subtask gets a part of the budget."""

_OWN = frozenset({"budget_exceeded", "deadline_exceeded"})
"""Errors of a subtask that are the parent's own: its budget and its deadline are what they share."""


def child_id(parent_id: str, subtask_id: str) -> str:
    """Return the task id of a subtask: the same whoever computes it."""
    digest = blake2b(f"{parent_id}:{subtask_id}".encode(), digest_size=16).digest()
    return base64.b32encode(digest).decode().rstrip("=").lower()


def start_plan(envelope: Envelope, subtasks: Sequence[Subtask]) -> SplitPlan:
    """Return the plan of a task about to be parked, with the first subtasks running."""
    named = tuple(
        Subtask(
            id=part.id,
            description=part.description,
            domain=part.domain,
            dependencies=part.dependencies,
            estimated_complexity=part.estimated_complexity,
            child_id=child_id(envelope.task_id, part.id),
        )
        for part in subtasks
    )
    return advance(SplitPlan(parent_id=envelope.task_id, subtasks=named, envelope=envelope))


def keep_whole(envelope: Envelope, why: str) -> SplitPlan:
    """Return the plan of a task that stays whole: the decision is made once, however often the task comes."""
    return SplitPlan(parent_id=envelope.task_id, state="done", subtasks=(), envelope=envelope, note=cut_note(why))


def for_attempt(plan: SplitPlan, envelope: Envelope) -> SplitPlan:
    """Return the plan with `envelope` as its parked task where that is of a newer attempt; else the plan as it is.

    The subtasks stay as they are: they go on, and their outputs are for the attempt that asked last.
    """
    return plan if envelope.attempt <= plan.envelope.attempt else replace(plan, envelope=charged_as(plan, envelope))


def charged_as(plan: SplitPlan, envelope: Envelope) -> Envelope:
    """Return the envelope with the question for its plan counted, unless it is: its twin may have asked it."""
    asked = plan.envelope.phase_usage.get("scale")
    return envelope if asked is None or "scale" in envelope.phase_usage else charged(envelope, "scale", asked)


def advance(plan: SplitPlan) -> SplitPlan:
    """Return the plan with every subtask running whose dependencies have succeeded; joining when all have.

    It is done instead when a subtask has failed, or no tokens are left.
    """
    if error := failure(plan):
        return replace(finish(plan), error=error)
    done = {part.id for part in plan.subtasks if part.state == "succeeded"}
    if len(done) == len(plan.subtasks):
        return replace(plan, state="joining")
    ready = {part.id for part in plan.subtasks if part.state == "waiting" and done.issuperset(part.dependencies)}
    grants = _grants(plan, ready)
    plan = replace(plan, subtasks=tuple(_begun(part, grants) for part in plan.subtasks))
    error = failure(plan)
    return replace(finish(plan), error=error) if error else plan


def _begun(part: Subtask, grants: Mapping[str, int | None]) -> Subtask:
    if part.id not in grants:
        return part
    grant = grants[part.id]
    if grant == 0:
        return replace(part, state="failed", error=TaskError(code="budget_exceeded", message="no tokens are left"))
    return replace(part, state="running", grant=grant)


def _grants(plan: SplitPlan, ready: Collection[str]) -> dict[str, int | None]:
    """Share what is left of the budget among all that has not begun, by how hard each is; what is unused comes back."""
    left = tokens_left(plan)
    if left is None or plan.envelope.budget is None:
        return dict.fromkeys(ready)
    lent = sum(max(0, (part.grant or 0) - part.tokens) for part in running(plan))
    free = max(0.0, left - lent - plan.envelope.budget * SYNTHESIS_SHARE)
    weights = {part.id: LEAST_WEIGHT + part.estimated_complexity for part in plan.subtasks if part.state == "waiting"}
    weight = sum(weights.values())
    return {name: int(free * weights[name] / weight) for name in ready}


def tokens_left(plan: SplitPlan) -> int | None:
    """Return the parent's budget less what its subtasks have used; None when there is no limit."""
    budget = plan.envelope.budget
    return None if budget is None else budget - sum(part.tokens for part in plan.subtasks)


def record_child(plan: SplitPlan, record: TaskRecord) -> SplitPlan:
    """Return the plan after the child of that (ended) record; a second time, nothing changes.

    A subtask that failed fails the plan, and so does a budget that is spent. In a plan that is done only the state of
    the subtask is written.
    """
    subtasks = tuple(_ended(part, record) if part.child_id == record.task_id else part for part in plan.subtasks)
    if subtasks == plan.subtasks:
        return plan
    noted = replace(plan, subtasks=subtasks)
    return advance(noted) if plan.state == "running" else noted


def _ended(part: Subtask, record: TaskRecord) -> Subtask:
    if part.state != "running" or not record.ended or record.state in {"accepted", "running"}:
        return part
    result = record.to_result()
    return replace(
        part,
        state=record.state,
        error=_short(record.error),
        node_id=result.node_id,
        owner=result.owner,
        tokens=tokens_of(record),
        spent=used_in_all(record),
        duration_s=record.lasted_s,
    )


def _short(error: TaskError | None) -> TaskError | None:
    """Return an error without the answer that was refused: a plan holds no outputs."""
    return replace(error, best_rejected=None) if error is not None else None


def failure(plan: SplitPlan) -> TaskError | None:
    """Return why the parent fails; None while it does not."""
    for part in plan.subtasks:
        if part.state in ("failed", "cancelled"):
            why = part.error.message if part.error else ""
            code = part.error.code if part.error else part.state
            if code in _OWN:
                return TaskError(code=code, message=f"subtask {part.id}: {why}"[:2000])
            return TaskError(code="subtask_failed", message=f"subtask {part.id} ended with {code}: {why}"[:2000])
    left = tokens_left(plan)
    if left is not None and left <= 0:
        return TaskError(code="budget_exceeded", message="the subtasks have used all tokens of the budget")
    return None


def running(plan: SplitPlan) -> list[Subtask]:
    """Return the subtasks that have begun and not ended, in the order of the plan."""
    return [part for part in plan.subtasks if part.state == "running"]


def begun_by(plan: SplitPlan, child_id: str) -> list[Subtask]:
    """Return the running subtasks that the end of that child was the last to hold up, or may have been."""
    ended = {part.id for part in plan.subtasks if part.child_id == child_id}
    return [part for part in running(plan) if not ended.isdisjoint(part.dependencies)]


def finish(plan: SplitPlan) -> SplitPlan:
    """Return the plan as over, whatever its subtasks did."""
    return replace(plan, state="done")


def child_of(plan: SplitPlan, part: Subtask, outputs: Mapping[str, str], now: float) -> Envelope:
    """Return the first envelope of a subtask.

    Args:
        outputs: subtask id -> what came out, for each of its dependencies; what the parent was given comes on top.
        now: Server time, seconds since the epoch.
    """
    parent = plan.envelope
    given = parent.split.inputs if parent.split else {}
    ad = TaskAd(
        task_id=part.child_id or child_id(parent.task_id, part.id),
        domain=part.domain or parent.domain,
        description=part.description,
        estimated_complexity=part.estimated_complexity,
        priority=parent.priority,
        token_budget=part.grant,
        timeout_s=max(0.001, min(86_400.0, parent.deadline - now)),
        context={key: value for key, value in parent.ad.context.items() if key != PLAN},
    )
    ad = as_part(ad, parent.ad)
    split = Split(
        parent=parent.task_id,
        depth=parent.depth + 1,
        subtask=part.id,
        grant=part.grant,
        deadline=parent.deadline,
        inputs=fit_inputs({**given, **{name: outputs.get(name, "") for name in part.dependencies}}),
    )
    return Envelope(
        ad=ad,
        submitter=parent.submitter,
        split=split,
        deadline=parent.deadline,
        budget=part.grant,
        trace=parent.trace,
    )


def begun_event(plan: SplitPlan, part: Subtask, now: float) -> SubtaskEvent:
    """Return what clients get when a subtask begins."""
    return SubtaskEvent(
        parent_id=plan.parent_id,
        child_id=part.child_id or child_id(plan.parent_id, part.id),
        subtask=part.id,
        state="begun",
        description=cut_utf8(part.description, DESCRIPTION_BYTES)[0],
        at=now,
    )


def ended_event(plan: SplitPlan, record: TaskRecord, now: float) -> SubtaskEvent | None:
    """Return what clients get when the subtask of that (ended) record ends; None where the plan does not know it."""
    part = next((part for part in plan.subtasks if part.child_id == record.task_id), None)
    if part is None or record.state in {"accepted", "running"}:
        return None
    result = record.to_result()
    return replace(
        begun_event(plan, part, record.ended_at or now),
        state="ended",
        child_state=record.state,
        node_id=result.node_id,
        owner=result.owner,
        error=result.error.code if result.error else "",
    )


def synthesis_envelope(plan: SplitPlan, outputs: Mapping[str, str]) -> Envelope:
    """Return the parent's envelope with all outputs, in the order of the plan, for the awarded node to synthesise."""
    inputs = fit_inputs({part.id: outputs.get(part.id, "") for part in plan.subtasks})
    return replace(with_parts(plan.envelope, plan.subtasks), inputs=inputs)


def fit_inputs(inputs: Mapping[str, str]) -> dict[str, str]:
    """Return the inputs, the longest ones cut so that all together fit on an envelope."""
    room, kept = MAX_INPUTS_BYTES, {}
    for count, name in enumerate(sorted(inputs, key=lambda name: len(inputs[name]))):
        kept[name], _ = cut_utf8(inputs[name], room // (len(inputs) - count))
        room -= len(encode(kept[name]))
    return {name: kept[name] for name in inputs}
