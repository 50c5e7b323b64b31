"""`loom tap`."""

from collections import deque
from dataclasses import replace
from typing import Annotated, Any

import typer

from loom.bus.bus import Bus
from loom.bus.queries import ended_since, rewards_since
from loom.bus.tap import Tap, TappedMessage
from loom.runner.cli.common import PATIENCE_S, check_has_run, domain_slug, node_name, seconds
from loom.runner.cli.entry import DEFAULT_URL, prepare, run_to_end
from loom.runner.cli.views.message_filter import MessageFilter
from loom.runner.cli.views.message_lines import MessageLines, json_line
from loom.runner.cli.views.stdout_writer import StdoutWriter
from loom.runner.cli.views.tables import console
from loom.runner.settings import Settings
from loom.schemas.base import encode
from loom.schemas.envelope import PHASES
from loom.schemas.learning.reward import Reward
from loom.schemas.task import TaskResult

ROOM = 2_000
"""Messages that may wait for a slow screen; further ones are skipped and counted."""


EXAMPLES = """
    loom tap
    loom tap --task 3f9a21c4 --since 10m
    loom tap --phase match --json
"""


def tap(
    task: Annotated[
        str, typer.Option(metavar="ID", help="Only this task and its subtasks; its first 8 digits do.")
    ] = "",
    phase: Annotated[str, typer.Option(metavar="|".join(PHASES), help="Only messages to or from this phase.")] = "",
    node: Annotated[
        str, typer.Option(metavar="NODE", help="Only this node, or owner.node, and the tasks it works on.")
    ] = "",
    domain: Annotated[str, typer.Option(help="Only this domain.")] = "",
    since: Annotated[
        str, typer.Option(metavar="DURATION", help="Also print results and rewards from the last DURATION, e.g. 10m.")
    ] = "",
    is_all: Annotated[bool, typer.Option("--all", help="Include heartbeats of hosts and status probes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print whole messages, one JSON object a line.")] = False,
) -> None:
    """Print the messages of the namespace, one a line, until Ctrl-C."""
    if phase and phase not in PHASES:
        raise typer.BadParameter(f"{phase!r} is not one of {', '.join(PHASES)}", param_hint="--phase")
    wanted = MessageFilter(
        routine=is_all,
        task=task,
        phase=phase,
        node=node_name(node) or "",
        domain_token=domain_slug(domain) or "",
    )
    ago_s = seconds(since) if since else 0.0
    run_to_end(_tap(prepare("warning"), wanted, ago_s, as_json=as_json))


async def _tap(settings: Settings, wanted: MessageFilter, ago_s: float, *, as_json: bool) -> None:
    url = settings.nats_url or DEFAULT_URL
    line = json_line if as_json else MessageLines(console())
    async with (
        Bus(
            url, namespace=settings.loom_namespace, role="operator", identity=settings.identity, patience_s=PATIENCE_S
        ) as bus,
        Tap(bus, room=ROOM) as messages,
    ):
        typer.echo(f"listening on {bus.connection.address}, namespace {settings.loom_namespace}", err=True)
        writer = StdoutWriter()
        printed: set[str] = set()
        if ago_s:
            for seen in await past(bus, wanted, ago_s):
                printed.add(_identity(seen))
                await writer.write(line(seen))
        skipped = 0
        async for seen in messages:
            skipped += seen.skipped
            if wanted.passes(seen) and _identity(seen) not in printed:
                await writer.write(line(replace(seen, skipped=skipped)))
                skipped = 0
            else:
                await writer.pause()


def _identity(seen: TappedMessage) -> str:
    """Return what results and rewards of the past and of the present have in common; empty for other messages."""
    match seen.message:
        case TaskResult(task_id=task_id):
            return f"result {task_id}"
        case Reward(reward_id=reward_id, score=score):
            return f"reward {reward_id} {score}"
        case _:
            return ""


async def past(bus: Bus, wanted: MessageFilter, ago_s: float) -> list[TappedMessage]:
    """Return the results and rewards of the last seconds that pass the filter, oldest first.

    The oldest of either kind are skipped where there are more than ROOM.

    Raises:
        BusUnavailable: No phase has ever run here.
    """
    await check_has_run(bus)
    at = bus.clock.now() - ago_s
    passed = 0
    results, rewards = deque[TappedMessage](maxlen=ROOM), deque[TappedMessage](maxlen=ROOM)
    async for record in ended_since(bus, at):
        wanted.remember_subtask(record.envelope)
        seen = _as_seen(
            bus, ("result", record.envelope.submitter, record.task_id), record.to_result(), record.ended_at or at
        )
        if wanted.passes(seen):
            passed += 1
            results.append(seen)
    async for stored_at, reward in rewards_since(bus, at):
        seen = _as_seen(
            bus, ("reward", reward.source, reward.owner, reward.node_id, reward.domain_token), reward, stored_at
        )
        if wanted.passes(seen):
            passed += 1
            rewards.append(seen)
    kept = sorted((*results, *rewards), key=lambda seen: seen.at)
    return [replace(seen, skipped=passed - len(kept)) if seen is kept[0] else seen for seen in kept]


def _as_seen(bus: Bus, address: tuple[str, ...], message: Any, at: float) -> TappedMessage:
    subject = bus.subjects.of(*address)
    parsed = bus.subjects.parse(subject)
    return TappedMessage(
        subject=subject,
        family=address[0],
        tokens=parsed.tokens if parsed else {},
        message=message,
        headers={},
        at=at,
        size=len(encode(message)),
    )
