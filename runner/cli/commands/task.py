"""`loom task ls`, `show` and `cancel`."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import typer

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.natsio.ordered_consumer import OrderedConsumer
from loom.bus.natsio.stored_message import StoredMessage
from loom.bus.queries import FoundTask, recent_records, records_stream, rewards_since
from loom.bus.topology import stream_state
from loom.runner.cli.command_groups import command_group
from loom.runner.cli.common import (
    MANY,
    AsLines,
    TaskId,
    client_bus,
    connected,
    domain_slug,
    json_value,
    node_name,
    print_json,
    resolve_task,
)
from loom.runner.cli.entry import prepare, run_to_end, unless_lost
from loom.runner.cli.label_option import LabelPairs, labels_of
from loom.runner.cli.views.subtask_tree import Division, read_division
from loom.runner.cli.views.tables import console
from loom.runner.cli.views.task_details import show_task, show_waiting
from loom.runner.cli.views.task_table import QUEUED, TaskState, state_of, state_of_change, task_line, task_table
from loom.runner.settings import Settings
from loom.schemas.base import Undecodable, decode
from loom.schemas.identity import PUBLIC
from loom.schemas.learning.reward import Reward
from loom.schemas.record import TaskRecord

REWARDS_S = 5.0
"""Longest search for a task's rewards."""
EXAMPLES = """
    loom task ls --state failed
    loom task ls --text invoice --follow
    loom task show 3f9a21c4
    loom task cancel 3f9a21c4
"""


STATES = ("queued", "running", "succeeded", "failed", "cancelled")


class TaskFilter(NamedTuple):
    """Selects tasks; an empty field selects all."""

    state: str | None
    domain_token: str | None
    node: str | None
    labels: Mapping[str, str]
    text: str

    def matches(self, record: TaskRecord, state: TaskState) -> bool:
        """Return whether a task in this state matches."""
        envelope = record.envelope
        return (
            (self.state is None or state.state == self.state)
            and (self.domain_token is None or envelope.domain_token == self.domain_token)
            and (self.node is None or self.node in {record.claim.node, record.to_result().node})
            and self.labels.items() <= envelope.ad.labels.items()
            and self.text in f"{record.task_id} {envelope.ad.description}".casefold()
        )


def ls(
    state: Annotated[str | None, typer.Option(metavar="|".join(STATES), help="Only tasks in this state.")] = None,
    domain: Annotated[str | None, typer.Option(help="Only tasks of this domain.")] = None,
    node: Annotated[
        str | None, typer.Option(metavar="NODE", help="Only tasks that this node, or owner.node, works on or did last.")
    ] = None,
    label: LabelPairs = None,
    text: Annotated[str, typer.Option(help="Only tasks whose id or description contains this, in any case.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most tasks to list.")] = MANY,
    follow: Annotated[bool, typer.Option("--follow", help="Print a line for each later change, until Ctrl-C.")] = False,
    as_json: AsLines = False,
) -> None:
    """List recent tasks, the newest first."""
    if state is not None and state not in STATES:
        raise typer.BadParameter(f"{state!r} is not one of {', '.join(STATES)}", param_hint="--state")
    settings = prepare("warning")
    wanted = TaskFilter(state, domain_slug(domain), node_name(node), labels_of(label), text.casefold())
    run_to_end(_ls(settings, wanted, limit, follow=follow, as_json=as_json))


async def _ls(settings: Settings, wanted: TaskFilter, limit: int, *, follow: bool, as_json: bool) -> None:
    async with connected(settings) as bus:
        last_seq = (await bus.jetstream.api(f"STREAM.INFO.{records_stream(bus)[0]}"))["state"]["last_seq"]
        phases, waiting = await asyncio.gather(_phases(bus), stream_state(bus, "INTAKE"))
        states: dict[str, TaskState] = {}

        def matches(record: TaskRecord) -> bool:
            states[record.task_id] = state_of(record, phases)
            return wanted.matches(record, states[record.task_id])

        records = await recent_records(bus, limit, matches)
        _print(records, states, wanted, waiting["messages"], bus.clock.now(), as_json=as_json)
        if follow:
            await unless_lost(bus, _follow(bus, wanted, last_seq + 1, as_json=as_json))


def _print(
    records: Sequence[TaskRecord],
    states: Mapping[str, TaskState],
    wanted: TaskFilter,
    waiting: int,
    now: float,
    *,
    as_json: bool,
) -> None:
    if as_json:
        for record in records:
            state, phase = states[record.task_id]
            print_json({**json_value(record), "phase": phase, "queued": state == QUEUED})
        return
    screen = console()
    if records:
        screen.print(task_table(records, states, now))
    elif any(wanted):
        screen.print("no such task among those of the last 72 hours")
    else:
        screen.print('no tasks yet: submit one with `loom submit "what is to do"`')
    if waiting:
        screen.print(f"{waiting} more queued for admission")


async def _phases(bus: Bus) -> dict[str, str]:
    """Return the phase of each task that has a message in the stream of tasks; `later` where it is scheduled."""
    stream = bus.subjects.stream("TASKS")
    phases: dict[str, str] = {}
    for subjects in (bus.subjects.later("*", "*", "*"), bus.subjects.of("task", "*", "*", "*")):
        info = await bus.jetstream.api(f"STREAM.INFO.{stream}", {"subjects_filter": subjects})
        for subject in info["state"].get("subjects") or ():
            parsed = bus.subjects.parse(subject)
            if parsed is not None:
                phases[parsed.tokens["task_id"]] = "later" if parsed.family == "later" else parsed.tokens["phase"]
    return phases


async def _follow(bus: Bus, wanted: TaskFilter, start_seq: int, *, as_json: bool) -> None:
    """Print each task whose state or attempt changes."""
    stream, subject = records_stream(bus)
    reader = OrderedConsumer(bus.jetstream, stream, filter=subject, start_seq=start_seq)
    screen, printed = console(), dict[str, tuple[str, int]]()
    try:
        while True:
            for message in await reader.batch():
                record = _record_in(message)
                if record is None:
                    continue
                state, change = state_of_change(record), (record.state, record.claim.attempt)
                if not wanted.matches(record, state) or printed.get(record.task_id) == change:
                    continue
                printed[record.task_id] = change
                if record.ended:
                    del printed[record.task_id]
                if as_json:
                    print_json(record)
                else:
                    screen.print(task_line(record, state, message.stored_at), soft_wrap=True)
    finally:
        await reader.stop()


def _record_in(message: StoredMessage) -> TaskRecord | None:
    try:
        return decode(message.data, TaskRecord)
    except Undecodable:
        return None  # a deleted key, or a value that is not a record


def show(
    task_id: TaskId,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Show the progress of one task: hops, bids, subtasks, attempts, answer and rewards."""
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
    """Return the record as JSON, with the plan of a divided task, but without the plan's copy of the envelope."""
    document = json_value(record)
    if division.plan is not None:
        document["plan"] = json_value(division.plan)
        del document["plan"]["envelope"]
    return document


def cancel(task_id: TaskId) -> None:
    """Cancel a running task. Finished tasks are left unchanged."""
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


app = command_group("List, show and cancel tasks.", EXAMPLES, ls, show, cancel)
