"""What work earns: `loom reward`, `loom rewards`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from loom.bus.client import Bus
from loom.bus.history import find, newest
from loom.bus.ordered import OrderedReader, Stored
from loom.bus.reward_bus import RewardBus, judgement
from loom.runner.cli.looking import MANY, AsLines, TaskId, clock, domain_slug, looking, print_json
from loom.runner.cli.render import console, one_line, short
from loom.runner.cli.running import prepare, run_to_end, unless_lost
from loom.runner.settings import Settings
from loom.schemas.errors import InvalidTask
from loom.schemas.learning import Reward
from loom.schemas.wire import Undecodable, decode

GOOD, POOR = 0.7, 0.3
"""Scores from which a reward is shown green, and below which red."""


def reward(
    task_id: TaskId,
    score: Annotated[float, typer.Argument(metavar="SCORE", help="0 useless to 1 perfect.")],
    reason: Annotated[str, typer.Option(help="Why, for people.")] = "",
) -> None:
    """Judge an ended task: publish a person's reward for the node that did it."""
    run_to_end(_reward(prepare("warning"), task_id, score, reason))


async def _reward(settings: Settings, task_id: str, score: float, reason: str) -> None:
    async with looking(settings) as bus:
        found = await find(bus, task_id)
        if found.record is None:
            raise InvalidTask("only a task that a node has finished can be judged", task_id=task_id)
        given = judgement(found.record, score, reason)
        await RewardBus(bus=bus).publish(given)
    typer.echo(f"{given.score:.2f} for {given.node_id} in {given.slug}")


def rewards(
    follow: Annotated[bool, typer.Option("--follow", help="Go on with new ones until Ctrl-C.")] = False,
    node: Annotated[str | None, typer.Option(metavar="ID", help="Only this node's.")] = None,
    domain: Annotated[str | None, typer.Option(help="Only those in this domain.")] = None,
    limit: Annotated[int, typer.Option(min=0, max=100_000, help="How many of those there are.")] = MANY,
    as_json: AsLines = False,
) -> None:
    """Show the last rewards, the newest at the end."""
    settings = prepare("warning")
    run_to_end(_rewards(settings, node, domain_slug(domain), limit, follow=follow, as_json=as_json))


async def _rewards(
    settings: Settings, node: str | None, slug: str | None, limit: int, *, follow: bool, as_json: bool
) -> None:
    screen = console()
    async with looking(settings) as bus:
        stream, subject = bus.subjects.stream("REWARDS"), bus.subjects.of("reward", node or "*", slug or "*")
        there = await newest(bus, stream, subject, limit)
        for message in there.messages:
            _print(screen, message, as_json=as_json)
        if follow:
            await unless_lost(bus, _follow(bus, screen, stream, subject, there.last_seq + 1, as_json=as_json))
        elif not there.messages and not as_json:
            screen.print("no such rewards" if node or slug else "no rewards yet: they come with the first ended task")


async def _follow(bus: Bus, screen: Console, stream: str, subject: str, start_seq: int, *, as_json: bool) -> None:
    reader = OrderedReader(bus, stream, filter=subject, start_seq=start_seq)
    try:
        while True:
            for message in await reader.batch():
                _print(screen, message, as_json=as_json)
    finally:
        await reader.stop()


def _print(screen: Console, message: Stored, *, as_json: bool) -> None:
    try:
        given = decode(message.data, Reward)
    except Undecodable as error:
        typer.echo(f"{message.subject}: cannot be read: {one_line(error.message)}", err=True)
        return
    if as_json:
        print_json(given)
        return
    line = line_of(given, message.stored_at)
    if screen.is_terminal:
        line.truncate(screen.width, overflow="ellipsis")
    screen.print(line, soft_wrap=True)


def line_of(given: Reward, at: float) -> Text:
    """Return a reward as one line: when, how good, who, in what, for which task, in whose judgement."""
    style = "green" if given.score >= GOOD else "red" if given.score < POOR else "yellow"
    attempt = f" #{given.attempt}" if given.attempt > 1 else ""
    reason = f": {one_line(given.reason, 200)}" if given.reason else ""
    return Text.assemble(
        (f"{clock(at)}  ", "dim"),
        (f"{given.score:.2f}", style),
        (f"  {given.node_id:<16}", "bold"),
        f" {given.slug:<14} {short(given.task_id)}{attempt}  by {given.source}{reason}",
    )
