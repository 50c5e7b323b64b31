"""`loom reward ls`, `add` and `rebuild`."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loom.bus.bus import Bus
from loom.bus.natsio.ordered_consumer import OrderedConsumer
from loom.bus.natsio.stored_message import StoredMessage
from loom.bus.queries import latest
from loom.bus.rewards import RewardBus
from loom.bus.stored_rewards import fault_of
from loom.phases.adapt.evidence import forgets
from loom.phases.adapt.rebuild import WRONG, Compared, Rebuilt, compare, repair
from loom.phases.adapt.reward_weights import weights_of
from loom.runner.cli.command_groups import command_group
from loom.runner.cli.common import (
    MANY,
    AsLines,
    TaskId,
    add_row,
    clock,
    connected,
    domain_slug,
    print_json,
    resolve_task,
)
from loom.runner.cli.entry import prepare, run_to_end, unless_lost
from loom.runner.cli.views.tables import console, one_line, short, table_of
from loom.runner.settings import Settings
from loom.schemas.base import Undecodable, decode
from loom.schemas.errors import InvalidTask
from loom.schemas.identity import split_qualified
from loom.schemas.learning.judgement import judgement
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import Reward

VERDICTS = {
    "same": "as stored",
    "behind": "as stored; newer rewards are on their way",
    "differs": "stored otherwise",
    "missing": "not stored",
    "beyond": "the stream does not tell",
}
GOOD, POOR = 0.7, 0.3
"""Scores from which a reward is shown green, and below which red."""
EXAMPLES = """
    loom reward ls --follow
    loom reward add 3f9a21c4 0.2 --reason "wrong year"
    loom reward rebuild --write
"""


def ls(
    follow: Annotated[bool, typer.Option("--follow", help="Print new rewards as they come, until Ctrl-C.")] = False,
    node: Annotated[str | None, typer.Option(metavar="NODE", help="Only rewards of this node, or owner.node.")] = None,
    domain: Annotated[str | None, typer.Option(help="Only rewards in this domain.")] = None,
    limit: Annotated[int, typer.Option(min=0, max=100_000, help="Most rewards to list.")] = MANY,
    as_json: AsLines = False,
) -> None:
    """List the latest rewards, the newest last."""
    settings = prepare("warning")
    run_to_end(_ls(settings, node, domain_slug(domain), limit, follow=follow, as_json=as_json))


async def _ls(
    settings: Settings, node: str | None, domain_token: str | None, limit: int, *, follow: bool, as_json: bool
) -> None:
    screen = console()
    async with connected(settings) as bus:
        stream, subject = (
            bus.subjects.stream("REWARDS"),
            bus.subjects.of("reward", "*", *(split_qualified(node) if node else ("*", "*")), domain_token or "*"),
        )
        newest = await latest(bus, stream, subject, limit, _is_reward)
        for message in newest.messages:
            _print(bus, screen, message, as_json=as_json)
        if follow:
            await unless_lost(bus, _follow(bus, screen, stream, subject, newest.last_seq + 1, as_json=as_json))
        elif not newest.messages and not as_json:
            screen.print(
                "no such rewards" if node or domain_token else "no rewards yet: they come with the first ended task"
            )


async def _follow(bus: Bus, screen: Console, stream: str, subject: str, start_seq: int, *, as_json: bool) -> None:
    reader = OrderedConsumer(bus.jetstream, stream, filter=subject, start_seq=start_seq)
    try:
        while True:
            for message in filter(_is_reward, await reader.batch()):
                _print(bus, screen, message, as_json=as_json)
    finally:
        await reader.stop()


def _is_reward(message: StoredMessage) -> bool:
    """Return whether a message is a reward of a run, not a snapshot of a profile."""
    try:
        return decode(message.data, Reward).kind != "snapshot"
    except Undecodable:
        return True  # printed as unreadable


def _print(bus: Bus, screen: Console, message: StoredMessage, *, as_json: bool) -> None:
    try:
        given = decode(message.data, Reward)
    except Undecodable as error:
        typer.echo(f"{message.subject}: cannot be read: {one_line(error.message)}", err=True)
        return
    if (fault := fault_of(given, message, bus.subjects)) is not None:
        typer.echo(f"{message.subject}: is left out: {fault[1]}", err=True)
        return
    if as_json:
        print_json(given)
        return
    line = line_of(given, message.stored_at)
    if screen.is_terminal:
        line.truncate(screen.width, overflow="ellipsis")
    screen.print(line, soft_wrap=True)


def line_of(given: Reward, at: float) -> Text:
    """Return a reward as one line: time, score, node, domain, task, source and reason."""
    style = "green" if given.score >= GOOD else "red" if given.score < POOR else "yellow"
    attempt = f" #{given.attempt}" if given.attempt > 1 else ""
    reason = f": {one_line(given.reason, 200)}" if given.reason else ""
    return Text.assemble(
        (f"{clock(at)}  ", "dim"),
        (f"{given.score:.2f}", style),
        (f"  {given.node:<16}", "bold"),
        f" {given.domain_token:<14} {short(given.task_id)}{attempt}  by {given.source}{reason}",
    )


def add(
    task_id: TaskId,
    score: Annotated[float, typer.Argument(metavar="SCORE", help="From 0 (useless) to 1 (perfect).")],
    reason: Annotated[str, typer.Option(help="Reason, for readers of the reward.")] = "",
) -> None:
    """Publish a reward for the node that did a finished task. The source is LOOM_SOURCE."""
    run_to_end(_add(prepare("warning"), task_id, score, reason))


async def _add(settings: Settings, task_id: str, score: float, reason: str) -> None:
    async with connected(settings) as bus:
        found = await resolve_task(bus, task_id)
        if found.record is None:
            raise InvalidTask("only a task that a node has finished can be judged", task_id=task_id)
        given = judgement(found.record, score, reason, bus.identity.source)
        await RewardBus(bus=bus).publish(given)
    typer.echo(f"{given.score:.2f} for {given.node} in {given.domain_token}")


def rebuild(
    write: Annotated[bool, typer.Option("--write", help="Overwrite stored profiles that differ.")] = False,
    as_json: AsLines = False,
) -> None:
    """Rebuild every node profile from the stream of rewards and compare it with the stored one."""
    raise typer.Exit(run_to_end(_rebuild(prepare("warning"), write=write, as_json=as_json)))


async def _rebuild(settings: Settings, *, write: bool, as_json: bool) -> int:
    """Return the exit code: 1 when a wrong profile is left."""
    async with connected(settings) as bus:
        config = settings.cluster
        weights = weights_of(config.judge_weights)
        rebuilt, compared = await compare(bus, forget=forgets(config.policy), weights=weights)
        lost = await repair(bus, compared) if write else []
    wrong = [one.node for one in compared if one.verdict in WRONG and (not write or one.key in lost)]
    if as_json:
        for one in compared:
            print_json(_as_object(one, written=write and one.verdict in WRONG and one.key not in lost))
    else:
        _show(rebuilt, compared, wrong, written=write)
    return 1 if wrong else 0


def _as_object(one: Compared, *, written: bool) -> dict[str, Any]:
    stored = one.stored.value if one.stored else None
    owner, node_id = split_qualified(one.key)
    return {
        "node_id": node_id,
        "owner": owner,
        "verdict": one.verdict,
        "stored": stored,
        "rebuilt": one.rebuilt,
        "written": written,
    }


def _show(rebuilt: Rebuilt, compared: Sequence[Compared], wrong: Sequence[str], *, written: bool) -> None:
    screen = console()
    if not compared:
        screen.print("no rewards yet: they come with the first ended task")
        return
    screen.print(_comparison(compared))
    start = f"the snapshots at reward {rebuilt.start.seq}" if rebuilt.start.seq else "its first reward"
    if not rebuilt.start.whole:
        start = f"reward {rebuilt.start.seq + 1}: what came before is gone, and no snapshots stand in for it"
    screen.print(Text(f"Folded from {start} to reward {rebuilt.last_seq}."))
    if wrong and written:
        screen.print(Text(f"Changed by another process meanwhile: {', '.join(wrong)}. Run the command again."))
    elif wrong:
        screen.print(
            Text("--write stores the rebuilt ones. LOOM_POLICY and LOOM_JUDGE_WEIGHTS are to be as they are for ADAPT.")
        )
    elif written:
        count = sum(one.verdict in WRONG for one in compared)
        screen.print(Text(f"{count} profiles written."))


def _comparison(compared: Sequence[Compared]) -> Table:
    numbers = ("stored", "rebuilt", "at")
    table = table_of(("node", *numbers, "profile"), right=numbers, ratios={"node": 1, "profile": 2})
    for one in compared:
        style = "red" if one.verdict in WRONG else "yellow" if one.verdict == "beyond" else "green"
        at = str(one.rebuilt.last_seq) if one.rebuilt else "-"
        stored = one.stored.value if one.stored else None
        add_row(table, one.node, _summary(stored), _summary(one.rebuilt), at, Text(VERDICTS[one.verdict], style))
    table.caption = "stored, rebuilt: tasks and mean success. at: the last reward folded."
    return table


def _summary(profile: NodeProfile | None) -> str:
    return f"{profile.total_tasks} {profile.success_rate:.2f}" if profile else "-"


app = command_group("List rewards, add your own, and rebuild profiles from them.", EXAMPLES, ls, add, rebuild)
