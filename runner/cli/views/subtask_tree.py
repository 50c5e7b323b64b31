"""What became of a task's parts, as a tree: its subtasks, what its runs delegated, and their parts."""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace
from rich.table import Table
from rich.text import Text

from loom.bus.bus import Bus
from loom.bus.queries import FoundTask, find_task
from loom.phases.shared.token_usage import total_tokens
from loom.runner.cli.common import add_row, span
from loom.runner.cli.views.run_progress import STYLES
from loom.runner.cli.views.tables import ROWS, one_line, short, table_of
from loom.schemas.errors import UnknownTask
from loom.schemas.identity import LOCAL_OWNER, qualified
from loom.schemas.plan import SplitPlan, Subtask
from loom.schemas.record import TaskRecord

MOST_READ = 64
"""Tasks read for one tree."""
WORDS = 200
NAME_CHARS = 28


@dataclass(frozen=True)
class Division:
    """What is known of the tasks that others are made of."""

    root: str
    plans: Mapping[str, SplitPlan] = field(default_factory=dict)
    """task id -> its plan, of each that was divided."""
    found: Mapping[str, FoundTask] = field(default_factory=dict)
    """task id -> its record, and where it is."""

    @property
    def plan(self) -> SplitPlan | None:
        """The task's own plan; None when it was not divided, which is a plan without parts."""
        plan = self.plans.get(self.root)
        if plan is None or not plan.subtasks:
            return None
        return replace(plan, subtasks=tuple(self._as_recorded(part) for part in plan.subtasks))

    def _as_recorded(self, part: Subtask) -> Subtask:
        """Return the subtask with the end in its own record, where the plan does not have it yet."""
        found = self.found.get(part.child_id or "")
        record = found.record if found is not None else None
        if part.state != "running" or record is None or record.state in ("accepted", "running"):
            return part
        result = record.to_result()
        return replace(
            part,
            state=record.state,
            error=result.error,
            node_id=result.node_id,
            owner=result.owner,
            duration_s=record.lasted_s,
        )

    def parts(self, task_id: str) -> list[Subtask]:
        """Return the subtasks of a task in the order of its plan, then what it delegated."""
        plan, found = self.plans.get(task_id), self.found.get(task_id)
        delegated = found.record.delegated if found and found.record else ()
        inner = (self.found[each].record for each in delegated if each in self.found)
        subtasks = [self._as_recorded(part) for part in plan.subtasks] if plan else []
        return [*subtasks, *(_as_part(record) for record in inner if record)]


async def read_division(bus: Bus, record: TaskRecord) -> Division:
    """Return what a task was divided into; of very much, the first levels."""
    bucket = bus.bucket("plans", SplitPlan)
    plans: dict[str, SplitPlan] = {}
    found: dict[str, FoundTask] = {record.task_id: FoundTask(record, "")}
    level = [record.task_id]
    while level:
        entries = await asyncio.gather(*(bucket.get(each) for each in level))
        plans |= {entry.key: entry.value for entry in entries if entry is not None}
        below = [child_id for each in level for child_id in _below(plans.get(each), found[each].record)]
        below = [child_id for child_id in dict.fromkeys(below) if child_id not in found][: MOST_READ - len(found)]
        news = await asyncio.gather(*(_find(bus, child_id) for child_id in below))
        level = [child_id for child_id, one in zip(below, news, strict=True) if one is not None]
        found |= {child_id: one for child_id, one in zip(below, news, strict=True) if one is not None}
    return Division(record.task_id, plans, found)


def _below(plan: SplitPlan | None, record: TaskRecord | None) -> list[str]:
    begun = (part.child_id for part in (plan.subtasks if plan else ()) if part.state != "waiting")
    return [child_id for child_id in (*begun, *(record.delegated if record else ())) if child_id]


async def _find(bus: Bus, task_id: str) -> FoundTask | None:
    try:
        return await find_task(bus, task_id)
    except UnknownTask:  # on its way to its admission
        return None


def _as_part(record: TaskRecord) -> Subtask:
    """Delegated work, as if it stood in a plan."""
    envelope, result = record.envelope, record.to_result()
    return Subtask(
        id=short(record.task_id),
        description=f"delegated: {envelope.ad.description}",
        state="running" if record.state == "accepted" else record.state,
        child_id=record.task_id,
        grant=envelope.split.grant if envelope.split else None,
        node_id=result.node_id,
        owner=result.owner,
        error=result.error,
        tokens=total_tokens(record),
        duration_s=record.lasted_s,
    )


def progress_of(plan: SplitPlan) -> str:
    """Return how many parts have succeeded, in words."""
    done = sum(part.state == "succeeded" for part in plan.subtasks)
    return f"{done} of {len(plan.subtasks)} subtasks done"


def tree(division: Division, now: float) -> Table:
    """Return a row for each part, indented below what it is a part of; an empty table for a task without any."""
    rows = list(_rows(division, (division.root,), "", now))
    columns = ("subtask", "state", "node", "time", "tokens", "after", "what")
    filled = [index for index, _ in enumerate(columns) if any(row[index] for row in rows)]
    names = [columns[index] for index in filled]
    table = table_of(names, title=_title(division), right=("time", "tokens"), ratios={"what": 1})
    for column in table.columns[:1]:
        column.max_width = NAME_CHARS
    for row in rows[:ROWS]:
        add_row(table, *(row[index] for index in filled))
    if len(rows) > ROWS:
        table.caption = f"… and {len(rows) - ROWS} more"
    return table


def _title(division: Division) -> str:
    parts = division.parts(division.root)
    tokens = sum(part.tokens for part in parts)
    known = progress_of(division.plan) if division.plan else f"{len(parts)} delegated tasks"
    return f"{known}, {tokens} tokens" if tokens else known


def _rows(division: Division, above: tuple[str, ...], indent: str, now: float) -> Iterator[tuple[str | Text, ...]]:
    """The parts of the last task of `above`, which holds it and those it is a part of."""
    task_id = above[-1]
    parts, plan = division.parts(task_id), division.plans.get(task_id)
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        state = _state(part, plan)
        yield indent + ("└─ " if last else "├─ ") + part.id, state, *_facts(part, division, now)
        if part.child_id is not None and part.child_id not in above:
            yield from _rows(division, (*above, part.child_id), indent + ("   " if last else "│  "), now)


def _state(part: Subtask, plan: SplitPlan | None) -> Text:
    state: str = part.state
    if plan is not None and plan.state == "done" and state == "waiting":
        state = "not run"
    return Text(state, STYLES.get(state, "dim" if state == "not run" else "cyan"))


def _facts(part: Subtask, division: Division, now: float) -> Iterator[str | Text]:
    found = division.found.get(part.child_id or "")
    record = found.record if found is not None and part.state == "running" else None
    took = part.duration_s if record is None else max(0.0, (record.ended_at or now) - record.admitted_at)
    yield _node(part) or (record.claim.node if record else "")
    yield span(took) if took else ""
    yield (f"{part.tokens} of {part.grant}" if part.grant else str(part.tokens)) if part.tokens else ""
    yield ", ".join(part.dependencies)
    yield _says(part, found, division.plans.get(part.child_id or ""))


def _node(part: Subtask) -> str:
    return qualified(part.owner or LOCAL_OWNER, part.node_id) if part.node_id else ""


def _says(part: Subtask, found: FoundTask | None, inner: SplitPlan | None) -> Text:
    if part.error is not None:
        return Text(one_line(f"{part.error.code}: {part.error.message}", WORDS), "red")
    where = ""
    if part.state == "running" and inner is not None and inner.state == "running":
        where = f"({progress_of(inner)}) "
    elif part.state == "running" and found is not None and found.phase not in {"", "later"}:
        where = f"(in {found.phase}) "
    return Text(where + one_line(part.description, WORDS))
