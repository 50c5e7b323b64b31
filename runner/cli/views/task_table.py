"""A table of tasks."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from loom.runner.cli.common import add_row, age, clock, span
from loom.runner.cli.views.run_progress import STYLES
from loom.runner.cli.views.tables import one_line, short, table_of
from loom.runner.cli.views.task_timeline import submitted_at
from loom.schemas.record import TaskRecord

WHAT_CHARS = 24
"""Least width of the column with the work; other columns are cut before it."""
QUEUED = "queued"
"""State of a running task that no node works on."""


class TaskState(NamedTuple):
    """What a task does now."""

    state: str
    """State of the record, or `queued`."""
    phase: str
    """Phase whose turn it is, or `later` while a message is scheduled; empty when the task has ended."""


def state_of(record: TaskRecord, phases: Mapping[str, str]) -> TaskState:
    """Return what a task does now.

    Args:
        phases: Task id -> phase, from the stream of tasks.
    """
    if record.ended:
        return TaskState(record.state, "")
    phase = phases.get(record.task_id, "")
    is_running = phase == "execute" and record.claim.attempt >= record.envelope.attempt
    is_moving = phase not in {"execute", "match", "later"}  # sense, scale and evaluate work on it at once
    return TaskState(record.state if is_running or is_moving else QUEUED, phase)


def state_of_change(record: TaskRecord) -> TaskState:
    """Return the state of a record that has just changed: queued until an attempt has been claimed."""
    is_claimed = record.claim.attempt >= record.envelope.attempt
    return TaskState(record.state if record.ended or is_claimed else QUEUED, "")


def task_table(records: Sequence[TaskRecord], states: Mapping[str, TaskState], now: float) -> Table:
    """Return a table with a row for each record.

    Args:
        states: Task id -> what the task does now.
        now: Server time.
    """
    columns = ("age", "task", "state", "domain", "node", "phase", "time", "what")
    table = table_of(columns, right=("age", "time"), ratios={"what": 1})
    table.columns[-1].min_width = WHAT_CHARS
    for record in records:
        state, phase = states[record.task_id]
        took = span(max(0.0, record.ended_at - submitted_at(record))) if record.ended_at is not None else ""
        add_row(
            table,
            age(now - submitted_at(record)),
            short(record.task_id),
            Text(state, STYLES.get(state, "cyan")),
            one_line(record.envelope.domain, 12),
            node_of(record),
            phase,
            took,
            _what(record),
        )
    return table


def task_line(record: TaskRecord, state: TaskState, at: float) -> Text:
    """Return a task as one line; `at` is when it changed, server time."""
    node = node_of(record)
    return Text.assemble(
        (f"{clock(at)}  ", "dim"),
        (f"{short(record.task_id):<8}  ", "bold"),
        (f"{state.state:<9}", STYLES.get(state.state, "cyan")),
        f"  {one_line(record.envelope.domain, 12):<12}  {node + '  ' if node else ''}{_what(record)}",
    )


def node_of(record: TaskRecord) -> str:
    """Return the node that works on a task or did it last, as people write it."""
    return record.to_result().node or record.claim.node


def _what(record: TaskRecord) -> str:
    """Return the work or the error, after the parent of a subtask and the number of subtasks of a divided task."""
    envelope = record.envelope
    split, error = envelope.split, record.error
    what = one_line(envelope.ad.description, 200)
    if error is not None and record.state == "failed":
        what = f"{error.code}: {one_line(error.message, 200)}"
    if envelope.inputs:
        what = f"({len(envelope.inputs)} subtasks) {what}"
    if split is not None:
        what = f"{short(split.parent)}/{split.subtask or 'delegated'}: {what}"
    return what
