"""`loom task ls`, `show` and `cancel`."""

import asyncio
from typing import Annotated, Any

import msgspec
import typer

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.queries import FoundTask, recent_records, rewards_since
from loom.bus.topology import stream_state
from loom.runner.cli.common import (
    MANY,
    AsLines,
    TaskId,
    client_bus,
    connected,
    domain_slug,
    node_name,
    print_json,
    resolve_task,
)
from loom.runner.cli.entry import prepare, run_to_end
from loom.runner.cli.groups import command_group, epilog
from loom.runner.cli.label_option import LabelPairs, labels_of
from loom.runner.cli.views.subtask_tree import Division, read_division
from loom.runner.cli.views.tables import console
from loom.runner.cli.views.task_details import show_task, show_waiting
from loom.runner.cli.views.task_table import task_table
from loom.runner.settings import Settings
from loom.schemas.identity import PUBLIC
from loom.schemas.learning import Reward
from loom.schemas.record import TaskRecord

REWARDS_S = 5.0
"""Longest search for a task's rewards."""
EXAMPLES = """
    loom task ls --state failed
    loom task show 3f9a21c4
    loom task cancel 3f9a21c4
"""

app = command_group("List, show and cancel tasks.", EXAMPLES)

STATES = ("running", "succeeded", "failed", "cancelled")


@app.command(epilog=epilog(EXAMPLES))
def ls(
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
    run_to_end(_ls(settings, state, domain_slug(domain), node, labels_of(label), limit, as_json=as_json))


async def _ls(
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
        screen.print(task_table(records))
    elif any((state, domain_token, node, labels)):
        screen.print("no such task among those of the last 72 hours")
    else:
        screen.print('no tasks yet: hand one in with `loom submit "what is to do"`')
    if waiting:
        screen.print(f"{waiting} more waiting for admission")


@app.command()
def show(
    task_id: TaskId,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Show how one task went, or how far it is: hops, bids, subtasks, attempts, answer, rewards."""
    run_to_end(_show(prepare("warning"), task_id, as_json=as_json))


async def _show(settings: Settings, task_id: str, *, as_json: bool) -> None:
    async with connected(settings) as bus:
        found = await resolve_task(bus, task_id)
        screen = console()
        if found.record is None:
            if as_json:
                print_json(found.submission)
            elif found.submission is not None:
                show_waiting(screen, found.submission)
            return
        division = await read_division(bus, found.record)
        if as_json:
            print_json(_with_plan(found.record, division))
            return
        rewards, complete = await _rewards(bus, found.record)
        show_task(screen, found, division, rewards, bus.clock.now())
        if not complete:
            screen.print(f"Rewards: looked for {REWARDS_S:.0f} s; later ones may be missing.")


async def _rewards(bus: Bus, record: TaskRecord) -> tuple[list[Reward], bool]:
    """The rewards of a task, and whether all that may be there was read."""
    found: dict[str, Reward] = {}
    try:
        async with asyncio.timeout(REWARDS_S):
            async for _, reward in rewards_since(bus, record.admitted_at, domain_token=record.envelope.domain_token):
                if reward.task_id == record.task_id:
                    found[reward.reward_id] = reward  # a later one replaces its twin
    except TimeoutError:
        return list(found.values()), False
    return list(found.values()), True


def _with_plan(record: TaskRecord, division: Division) -> Any:
    """The record as JSON; of a divided task with its plan, whose envelope is the record's own."""
    told = msgspec.to_builtins(record)
    if division.plan is not None:
        told["plan"] = msgspec.to_builtins(division.plan)
        del told["plan"]["envelope"]
    return told


@app.command()
def cancel(task_id: TaskId) -> None:
    """Cancel a task; one that has ended stays as it ended."""
    run_to_end(_cancel(prepare("warning"), task_id))


async def _cancel(settings: Settings, task_id: str) -> None:
    if settings.loom_submitter != PUBLIC:  # its permissions are for requests about its own tasks, by their whole ids
        async with client_bus(settings) as bus:
            ended = await task_client.cancel(bus, task_id)
    else:
        async with connected(settings) as bus:
            ended = await task_client.cancel(bus, _whole_id(await resolve_task(bus, task_id)))
    if ended.state != "cancelled":
        typer.echo(f"{ended.task_id} had ended before: {ended.state}")
        raise typer.Exit(1)
    typer.echo(f"{ended.task_id} cancelled")


def _whole_id(found: FoundTask) -> str:
    if found.record is not None:
        return found.record.task_id
    return found.submission.ad.task_id if found.submission is not None else ""
