"""A run while it goes on."""

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from loom.runner.cli.views.run_state import Row, RunState
from loom.runner.cli.views.tables import one_line, short, table_of

DRAWS_PER_SECOND = 8
FRAME_LINES = 5
"""Lines of a live table besides its rows, and one for the prompt."""
STYLES = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "waiting": "dim"}


class Progress:
    """Shows a board: a table drawn again and again on a terminal, a line per change anywhere else."""

    def __init__(self, board: RunState, screen: Console) -> None:
        self._board = board
        self._screen = screen
        self._live: AbstractContextManager[Any] = nullcontext()
        if screen.is_terminal:
            self._live = Live(
                get_renderable=self._table, console=screen, refresh_per_second=DRAWS_PER_SECOND, transient=True
            )

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def changed(self, row: Row | None) -> None:
        """Tell of a row that is not as it was."""
        if row is not None and not self._screen.is_terminal:
            self._screen.print(Text(line(row)), soft_wrap=True)

    def _table(self) -> Table:
        return live_table(self._board, self._screen.size.height - FRAME_LINES)


def line(row: Row) -> str:
    """Return where a task is, as one line."""
    parts = [short(row.ad.task_id), row.phase]
    if row.node:
        parts.append(f"on {row.node}")
    if row.attempt > 1:
        parts.append(f"attempt {row.attempt}")
    if _divided(row):
        parts.append(_divided(row))
    return "  ".join(parts)


def _divided(row: Row) -> str:
    """How far the subtasks are; empty when there are none, or they are all over."""
    if row.ended or row.phase != "scale" or not row.parts:
        return ""
    return f"{len(row.parts_ended)} of {len(row.parts)} begun subtasks done"


def live_table(board: RunState, height: int) -> Table:
    """Return the board at `height` rows: all of it, or those in work and then those that wait."""
    rows = list(board.rows.values())
    ended = sum(row.ended for row in rows)
    failed = sum(row.ended and row.phase != "succeeded" for row in rows)
    if len(rows) > height:
        rows = sorted(rows, key=lambda row: (row.ended, row.phase == "waiting"))[: max(height, 1)]
    table = table_of(("task", "phase", "node", "output"), ratios={"output": 1})
    table.caption = f"{ended} of {len(board.rows)} done" + (f", {failed} failed" if failed else "")
    for row in rows:
        tail = (_divided(row) or one_line(row.tail[-60:])) if not row.ended else ""
        cells = (short(row.ad.task_id), Text(row.phase, STYLES.get(row.phase, "cyan")), row.node, Text(tail, "dim"))
        table.add_row(*cells)
    return table
