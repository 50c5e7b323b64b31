"""`loom tap`."""

from collections import deque
from dataclasses import replace
from typing import Annotated, Any

import typer

from loom.bus.bus import Bus
from loom.bus.queries import ended_since, rewards_since
from loom.bus.tap import Seen, Tap
from loom.runner.cli.common import PATIENCE_S, check_has_run, domain_slug, node_name, seconds
from loom.runner.cli.entry import DEFAULT_URL, prepare, run_to_end
from loom.runner.cli.views.message_filter import MessageFilter
from loom.runner.cli.views.message_lines import MessageLines, json_line
from loom.runner.cli.views.stdout_writer import StdoutWriter
from loom.runner.cli.views.tables import console
from loom.runner.settings import Settings
from loom.schemas.base import encode
from loom.schemas.envelope import PHASES
from loom.schemas.learning import Reward
from loom.schemas.task import TaskResult

ROOM = 2_000
"""Messages that may wait to be shown: a screen that lags by more shows the past, so later ones are skipped."""


EXAMPLES = """
    loom tap
    loom tap --task 3f9a21c4 --since 10m
    loom tap --phase match --json
"""


def tap(
    task: Annotated[
        str, typer.Option(metavar="ID", help="Only this task and its subtasks; its first 8 digits do.")
    ] = "",
    phase: Annotated[str, typer.Option(metavar="|".join(PHASES), help="Only what this phase gets and says.")] = "",
    node: Annotated[
        str, typer.Option(metavar="NODE", help="Only this node, or owner.node, and the tasks it works on.")
    ] = "",
    domain: Annotated[str, typer.Option(help="Only this domain.")] = "",
    since: Annotated[
        str, typer.Option(metavar="DURATION", help="Also print results and rewards from the last DURATION, e.g. 10m.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print every message whole, one JSON object a line.")] = False,
) -> None:
    """Show the traffic of the namespace, one line per message, until Ctrl-C."""
    if phase and phase not in PHASES:
        raise typer.BadParameter(f"{phase!r} is not one of {', '.join(PHASES)}", param_hint="--phase")
    sieve = MessageFilter(task=task, phase=phase, node=node_name(node) or "", domain_token=domain_slug(domain) or "")
    ago_s = seconds(since) if since else 0.0
    run_to_end(_tap(prepare("warning"), sieve, ago_s, as_json=as_json))


async def _tap(settings: Settings, sieve: MessageFilter, ago_s: float, *, as_json: bool) -> None:
    url = settings.nats_url or DEFAULT_URL
    line = json_line if as_json else MessageLines(console())
    async with (
        Bus(
            url, namespace=settings.loom_namespace, role="operator", identity=settings.identity, patience_s=PATIENCE_S
        ) as bus,
        Tap(bus, room=ROOM) as messages,
    ):
        typer.echo(f"listening on {bus.connection.address}, namespace {settings.loom_namespace}", err=True)
        spout = StdoutWriter()
        told: set[str] = set()
        if ago_s:
            for seen in await past(bus, sieve, ago_s):
                told.add(_once(seen))
                await spout.pour(line(seen))
        skipped = 0
        async for seen in messages:
            skipped += seen.skipped
            if sieve.passes(seen) and _once(seen) not in told:
                await spout.pour(line(replace(seen, skipped=skipped)))
                skipped = 0
            else:
                await spout.pause()


def _once(seen: Seen) -> str:
    """What tells a message of the past from others, however it came to be heard."""
    match seen.message:
        case TaskResult(task_id=task_id):
            return f"result {task_id}"
        case Reward(reward_id=reward_id, score=score):
            return f"reward {reward_id} {score}"
        case _:
            return ""


async def past(bus: Bus, sieve: MessageFilter, ago_s: float) -> list[Seen]:
    """Return the results and rewards of the last seconds that are wanted as if they were heard now, oldest first.

    Of more than ROOM of either kind the oldest are skipped.

    Raises:
        BusUnavailable: No phase has ever run here.
    """
    await check_has_run(bus)
    at = bus.clock.now() - ago_s
    wanted = 0
    results, rewards = deque[Seen](maxlen=ROOM), deque[Seen](maxlen=ROOM)
    async for record in ended_since(bus, at):
        sieve.hear_of(record.envelope)
        seen = _as_heard(
            bus, ("result", record.envelope.submitter, record.task_id), record.to_result(), record.ended_at or at
        )
        if sieve.passes(seen):
            wanted += 1
            results.append(seen)
    async for stored_at, reward in rewards_since(bus, at):
        seen = _as_heard(
            bus, ("reward", reward.source, reward.owner, reward.node_id, reward.domain_token), reward, stored_at
        )
        if sieve.passes(seen):
            wanted += 1
            rewards.append(seen)
    told = sorted((*results, *rewards), key=lambda seen: seen.at)
    return [replace(seen, skipped=wanted - len(told)) if seen is told[0] else seen for seen in told]


def _as_heard(bus: Bus, address: tuple[str, ...], message: Any, at: float) -> Seen:
    subject = bus.subjects.of(*address)
    parsed = bus.subjects.parse(subject)
    return Seen(
        subject=subject,
        family=address[0],
        tokens=parsed.tokens if parsed else {},
        message=message,
        headers={},
        at=at,
        size=len(encode(message)),
    )
