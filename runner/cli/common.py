"""Shared parts of the commands: connections, options, and the format of times, rows and JSON."""

import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from loom.bus.bus import Bus
from loom.bus.natsio.server_errors import Refused
from loom.bus.queries import FoundTask, find_task, recent_ids
from loom.bus.topology import check_version, stream_state
from loom.runner.cli.entry import DEFAULT_URL
from loom.runner.cli.views.tables import printable
from loom.runner.server.nats_server import embedded_server
from loom.runner.server.store import check_unused
from loom.runner.settings import Settings
from loom.schemas.base import encode
from loom.schemas.errors import BusUnavailable, UnknownTask
from loom.schemas.identity import qualified, split_qualified
from loom.schemas.tokens import domain_token

PATIENCE_S = 2.0
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
MANY = 20
"""Default number of entries of a list."""
BARS = "▁▂▃▄▅▆▇█"
SHORT_ID = 8
"""Digits of a shortened task id."""

TaskId = Annotated[str, typer.Argument(metavar="ID", help="Id of the task; the first 8 digits of a recent one.")]
AsLines = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]


def client_bus(settings: Settings) -> Bus:
    """Return a client's connection to the server of NATS_URL, to be opened."""
    url = settings.nats_url or DEFAULT_URL
    return Bus(url, namespace=settings.loom_namespace, identity=settings.identity, patience_s=PATIENCE_S)


@asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[Bus]:
    """Connect to the server of NATS_URL as an operator.

    Raises:
        BusUnavailable: There is no server, or no phase has ever run on it.
    """
    url = settings.nats_url or DEFAULT_URL
    async with Bus(
        url, namespace=settings.loom_namespace, role="operator", identity=settings.identity, patience_s=PATIENCE_S
    ) as bus:
        check_version(bus)
        await check_has_run(bus)
        yield bus
        if left_out := sum(bus.discards.counts.values()):
            typer.echo(f"unreadable messages that are not shown: {left_out}", err=True)


def check_one_server(settings: Settings, store: Path | None) -> None:
    """Refuse `--store` when NATS_URL names a server."""
    if settings.nats_url and store is not None:
        raise typer.BadParameter("NATS_URL names a server, and no other is started", param_hint="--store")


@asynccontextmanager
async def server_of(settings: Settings, store: Path | None) -> AsyncIterator[str]:
    """Yield the address of the server of NATS_URL, or of a temporary server on the store folder."""
    if store is None:
        yield settings.nats_url or DEFAULT_URL
        return
    check_unused(store)
    async with embedded_server(store, sync_interval=settings.loom_sync_interval or None) as server:
        yield server.url


async def resolve_task(bus: Bus, task_id: str) -> FoundTask:
    """Return the state of a task by its id; of a recent task also by the first eight digits of its id.

    Raises:
        UnknownTask: No task has that id, or several recent ids begin with these digits.
        InvalidTask: `task_id` is not an id.
    """
    try:
        return await find_task(bus, task_id)
    except UnknownTask:
        ids = await recent_ids(bus, task_id) if len(task_id) == SHORT_ID else []
        if len(ids) != 1:
            raise
        return await find_task(bus, ids[0])


async def check_has_run(bus: Bus) -> None:
    """Return when a phase has run in the namespace before.

    Raises:
        BusUnavailable: No phase has run before.
    """
    try:
        await stream_state(bus, "REWARDS")
    except Refused as error:
        where = f"namespace {bus.subjects.namespace} of {bus.connection.address}"
        raise BusUnavailable(f'no phases have run in {where}; run "loom up"') from error


def seconds(text: str) -> float:
    """Return the seconds that `90s`, `10m`, `2h` or `1d` stand for.

    Raises:
        typer.BadParameter: The text is not such a time.
    """
    parsed = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", text)
    if parsed is None:
        raise typer.BadParameter(f"{text!r} is not a time; write it like 90s, 10m, 2h or 1d")
    return float(parsed[1]) * UNITS[parsed[2]]


def domain_slug(domain: str | None) -> str | None:
    """Return the token of a domain as worded, or as a table shows it."""
    return domain_token(domain) if domain else None


def node_name(node: str | None) -> str | None:
    """Return a node as people write it, also where it is given with the owner `local`."""
    return qualified(*split_qualified(node)) if node else None


def clock(at: float) -> str:
    """Return a moment in local time, with its day unless that is today."""
    then, today = datetime.fromtimestamp(at), datetime.fromtimestamp(time.time())  # noqa: DTZ006 - the reader's own
    return then.strftime("%H:%M:%S" if then.date() == today.date() else "%d %b %H:%M")


def age(duration_s: float) -> str:
    """Return a duration in its largest unit: 12s, 5m, 3h, 2d."""
    for unit, seconds_of_unit in reversed(UNITS.items()):
        if duration_s >= seconds_of_unit:
            return f"{int(duration_s / seconds_of_unit)}{unit}"
    return "0s"


def span(duration_s: float) -> str:
    """Return a duration in about three digits: 0.4 ms, 85 ms, 1.25 s, 63 s, 12 min."""
    if duration_s < 0.01:  # noqa: PLR2004 - where milliseconds want a digit more
        return f"{duration_s * 1000:.1f} ms"
    if duration_s < 1:
        return f"{duration_s * 1000:.0f} ms"
    if duration_s < 10:  # noqa: PLR2004 - same
        return f"{duration_s:.2f} s"
    return f"{duration_s:.0f} s" if duration_s < 600 else f"{duration_s / 60:.0f} min"  # noqa: PLR2004 - ten minutes


def sparkline(scores: Iterable[float]) -> str:
    """Return scores from 0 to 1 as a line of bars."""
    return "".join(BARS[min(int(score * len(BARS)), len(BARS) - 1)] for score in scores)


def add_row(table: Table, *cells: str | Text) -> None:
    """Add cells as plain text, without markup and control characters."""
    table.add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells))


def json_value(message: Any) -> Any:
    """Return a message as the plain values of its JSON."""
    return msgspec.json.decode(encode(message))


def print_json(message: Any) -> None:
    """Print a message as one line of JSON."""
    typer.echo(encode(message))
