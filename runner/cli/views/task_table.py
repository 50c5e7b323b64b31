"""A table of tasks."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from loom.runner.cli.common import add_row, clock, span
from loom.runner.cli.views.run_progress import STYLES
from loom.runner.cli.views.tables import one_line, short, table_of
from loom.runner.cli.views.task_timeline import handed_in_at
from loom.schemas.record import TaskRecord


def task_table(records: Sequence[TaskRecord]) -> Table:
    """Return a table with a row for each record."""
    columns = ("admitted", "task", "state", "domain", "node", "time", "what")
    table = table_of(columns, right=("time",), ratios={"what": 1})
    for record in records:
        result = record.to_result()
        took = span(max(0.0, record.ended_at - handed_in_at(record))) if record.ended_at is not None else ""
        add_row(
            table,
            clock(record.admitted_at),
            short(record.task_id),
            Text(record.state, STYLES.get(record.state, "cyan")),
            one_line(record.envelope.domain, 12),
            result.node or record.claim.node,
            took,
            _what(record),
        )
    return table


def _what(record: TaskRecord) -> str:
    """The work, or why it failed; before it where a part comes from, and of a divided task how many it had."""
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
