"""Printable text, and tables that fit 80 columns."""

import os
import re
import sys
import unicodedata
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loom.runner.cli.views.run_state import RunState
from loom.schemas.auction import Award
from loom.schemas.learning.reward import Reward
from loom.schemas.task import TaskResult

ROWS = 40
"""Most rows of a closing table: the file of results has them all."""
MADE_ID = re.compile(r"[0-9a-f]{32}|[a-z2-7]{26}")
"""A generated id of a task or subtask."""


def printable(text: str) -> str:
    """Return `text` without what could steer a terminal; line breaks and tabs stay."""
    return "".join(c if c in "\n\t" or not unicodedata.category(c).startswith("C") else "�" for c in text)


def one_line(text: str, most: int = 1000) -> str:
    """Return `text` as one printable line of at most `most` characters."""
    line = printable(" ".join(text[: 4 * most].split()))
    return line if len(line) <= most else line[: most - 1] + "…"


def short(task_id: str) -> str:
    """Return enough of an id to recognise it."""
    return task_id[:8] if MADE_ID.fullmatch(task_id) else task_id


class _Console(Console):
    """A console whose closed output does not end the command."""

    def on_broken_pipe(self) -> None:
        """Stop printing, and redirect buffered output to /dev/null so that it cannot fail at the end of the process."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def console(*, stderr: bool = False) -> Console:
    """Return a console that adds no colour of its own to numbers and words."""
    return _Console(stderr=stderr, highlight=False)


def closing(board: RunState, results: Sequence[TaskResult]) -> list[Table]:
    """Return the tables that close a run: results, attempts with their awards and rewards, and what was learned."""
    tables = [_results(results), _attempts(board), _learned(board)]
    return [table for table in tables if table.row_count]


def _results(results: Sequence[TaskResult]) -> Table:
    table = table_of(
        ("task", "domain", "node", "tries", "s", "answer"), title="Results", right=("tries", "s"), ratios={"answer": 1}
    )
    shown = results if len(results) <= ROWS else sorted(results, key=lambda result: result.success)  # failures first
    for result in shown[:ROWS]:
        answer = Text(one_line(result.content.strip().partition("\n")[0], 200))
        if result.error is not None:
            answer = Text(one_line(f"{result.error.code}: {result.error.message}", 200), "red")
        elif result.below_threshold:
            answer = Text("(best there was) ", "yellow") + answer
        cells = (short(result.task_id), _word(result.domain), result.node, str(result.attempts))
        table.add_row(*cells, f"{result.duration_s:.1f}", answer)
    return _and_more(table, len(results))


def _attempts(board: RunState) -> Table:
    table = table_of(
        ("task", "awarded to", "score", "over", "reward", "signal"),
        title="Awards and rewards",
        right=("score", "reward", "signal"),
        ratios={"over": 1},
    )
    order = {task_id: index for index, task_id in enumerate(board.rows)}
    attempts = sorted(board.awards.keys() | board.rewards.keys(), key=lambda key: (order[key[0]], key[1]))
    for key in attempts[:ROWS]:
        task = short(key[0]) + (f" #{key[1]}" if key[1] > 1 else "")
        table.add_row(task, *_award_cells(board.awards.get(key)), *_reward_cells(board.rewards.get(key)))
    return _and_more(table, len(attempts))


def _award_cells(award: Award | None) -> tuple[str, str, str]:
    if award is None:
        return "", "", ""
    if award.pinned:
        return award.node, "", "(pinned)"
    losers = award.bids[1:]
    next_best = f"{losers[0].node} {losers[0].score:.2f}" if losers else ""
    more = f" +{len(losers) - 1}" if len(losers) > 1 else ""
    return award.node, f"{award.score:.2f}", next_best + more


def _reward_cells(reward: Reward | None) -> tuple[str, str]:
    return ("", "") if reward is None else (f"{reward.score:.2f}", f"{reward.signal.total:.2f}")


def _learned(board: RunState) -> Table:
    table = table_of(("node", "domain", "mean reward", "rewards"), title="Learned", right=("mean reward", "rewards"))
    known = [
        (node, board.domains.get(domain_token, domain_token), evidence)
        for node, profile in sorted(board.profiles.items())
        for domain_token, evidence in sorted(profile.domains.items())
    ]
    for node, domain, evidence in known[:ROWS]:
        table.add_row(node, _word(domain), f"{evidence.mean:.2f}", str(evidence.count))
    return _and_more(table, len(known))


def table_of(
    columns: Sequence[str], *, title: str = "", right: Sequence[str] = (), ratios: dict[str, int] | None = None
) -> Table:
    """A table whose rows are one line each, cut where they do not fit."""
    table = Table(title=title or None, title_justify="left", title_style="bold", caption_justify="left", box=None)
    table.expand = bool(ratios)
    for name in columns:
        table.add_column(
            name,
            justify="right" if name in right else "left",
            ratio=(ratios or {}).get(name),
            no_wrap=True,
            overflow="ellipsis",
            max_width=None if (ratios or {}).get(name) else 16,
            header_style="dim",
        )
    return table


def _and_more(table: Table, rows: int) -> Table:
    if rows > ROWS:
        table.caption = f"… and {rows - ROWS} more"
    return table


def _word(text: str) -> str:
    return one_line(text, 16)


def show(screen: Console, tables: Sequence[Table]) -> None:
    """Print tables with a blank line before each."""
    for table in tables:
        screen.print()
        screen.print(table)
