"""Many tasks, and the end of one: `loom tasks`, `loom cancel`."""

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from loom.bus import task_client as client
from loom.bus.queries import FoundTask, recent_records
from loom.bus.topology import stream_state
from loom.runner.cli.common import (
    MANY,
    AsLines,
    TaskId,
    add_row,
    client_bus,
    clock,
    connected,
    domain_slug,
    node_name,
    print_json,
    resolve_task,
    span,
)
from loom.runner.cli.entry import prepare, run_to_end
from loom.runner.cli.label_option import LabelPairs, labels_of
from loom.runner.cli.views.run_progress import STYLES
from loom.runner.cli.views.tables import console, one_line, short, table_of
from loom.runner.cli.views.task_timeline import handed_in_at
from loom.runner.settings import Settings
from loom.schemas.envelope import TaskRecord
from loom.schemas.identity import PUBLIC

STATES = ("running", "succeeded", "failed", "cancelled")


def tasks(
    state: Annotated[str | None, typer.Option(metavar="|".join(STATES), help="Only tasks in this state.")] = None,
    domain: Annotated[str | None, typer.Option(help="Only tasks of this domain.")] = None,
    node: Annotated[
        str | None, typer.Option(metavar="NODE", help="Only tasks this node, or owner.node, has last worked on.")
    ] = None,
    label: LabelPairs = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = MANY,
    as_json: AsLines = False,
) -> None:
    """List recent tasks, the newest first."""
    if state is not None and state not in STATES:
        raise typer.BadParameter(f"{state!r} is not one of {', '.join(STATES)}", param_hint="--state")
    settings = prepare("warning")
    run_to_end(_tasks(settings, state, domain_slug(domain), node, labels_of(label), limit, as_json=as_json))


async def _tasks(
    settings: Settings,
    state: str | None,
    domain_token: str | None,
    node: str | None,
    labels: dict[str, str],
    limit: int,
    *,
    as_json: bool,
) -> None:
    node = node_name(node)

    def wanted(record: TaskRecord) -> bool:
        return (
            (state is None or record.state == state)
            and (domain_token is None or record.envelope.domain_token == domain_token)
            and (node is None or node in {record.claim.node, record.to_result().node})
            and labels.items() <= record.envelope.ad.labels.items()
        )

    async with connected(settings) as bus:
        records = await recent_records(bus, limit, wanted)
        waiting = (await stream_state(bus, "INTAKE"))["messages"]
    if as_json:
        for record in records:
            print_json(record)
        return
    screen = console()
    if records:
        screen.print(_list(records))
    elif any((state, domain_token, node, labels)):
        screen.print("no such task among those of the last 72 hours")
    else:
        screen.print('no tasks yet: hand one in with `loom submit "what is to do"`')
    if waiting:
        screen.print(f"{waiting} more waiting for admission")


def _list(records: Sequence[TaskRecord]) -> Table:
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


def cancel(task_id: TaskId) -> None:
    """Cancel a task; one that has ended stays as it ended."""
    run_to_end(_cancel(prepare("warning"), task_id))


async def _cancel(settings: Settings, task_id: str) -> None:
    if settings.loom_submitter != PUBLIC:  # its permissions are for requests about its own tasks, by their whole ids
        async with client_bus(settings) as bus:
            ended = await client.cancel(bus, task_id)
    else:
        async with connected(settings) as bus:
            ended = await client.cancel(bus, _whole_id(await resolve_task(bus, task_id)))
    if ended.state != "cancelled":
        typer.echo(f"{ended.task_id} had ended before: {ended.state}")
        raise typer.Exit(1)
    typer.echo(f"{ended.task_id} cancelled")


def _whole_id(found: FoundTask) -> str:
    if found.record is not None:
        return found.record.task_id
    return found.submission.ad.task_id if found.submission is not None else ""
