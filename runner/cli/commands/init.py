"""`loom init`: streams, buckets and consumers."""

import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.service_discovery import check_processes
from loom.bus.wire_version import WIRE, WireMismatch
from loom.runner.cli.common import check_one_server, server_of
from loom.runner.cli.entry import DEFAULT_URL, prepare, run_to_end
from loom.runner.settings import Settings

EXAMPLES = """
    loom init
    LOOM_NAMESPACE=test loom init --reset --yes
    loom init --store ~/loom-data
"""


class Made(NamedTuple):
    """Names of streams and buckets that `loom init` changed."""

    deleted: list[str]
    created: list[str]
    differences: list[str]
    """Sentences about existing streams and buckets whose configuration differs."""


def init(
    reset: Annotated[
        bool, typer.Option("--reset", help="First delete streams and buckets, with all tasks and all evidence.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --reset: do not ask for confirmation.")] = False,
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Store folder of a `loom up` or a program that is not running.",
        ),
    ] = None,
) -> None:
    """Create the missing streams, buckets and consumers of the namespace. Existing ones are left unchanged."""
    settings = prepare("error")
    check_one_server(settings, store)
    if reset and not yes:
        _confirm(settings.loom_namespace, str(store or Bus(settings.nats_url or DEFAULT_URL).connection.address))
    made = run_to_end(_init(settings, store, reset=reset))
    for name in made.deleted:
        typer.echo(f"deleted  {name}")
    for name in made.created:
        typer.echo(f"created  {name}")
    for difference in made.differences:
        typer.echo(f"differs  {difference}")
    count = f"{len(topology.BUCKETS)} buckets and {len(topology.LANES)} consumers"
    typer.echo(f"namespace {settings.loom_namespace} has its streams, {count}, wire version {WIRE}")


def _confirm(namespace: str, where: str) -> None:
    """Ask for confirmation on the terminal.

    Raises:
        typer.BadParameter: There is no terminal to ask on.
        typer.Abort: The answer is no.
    """
    if not sys.stdin.isatty():
        raise typer.BadParameter("deletes all tasks and all evidence: add --yes", param_hint="--reset")
    typer.confirm(f"Delete all tasks, records and evidence in namespace {namespace} on {where}?", abort=True)


async def _init(settings: Settings, store: Path | None, *, reset: bool) -> Made:
    async with (
        server_of(settings, store) as url,
        Bus(url, namespace=settings.loom_namespace, role="operator", identity=settings.identity) as bus,
    ):
        topology.check_version(bus)
        await check_processes(bus)
        deleted = await topology.delete(bus, settings.cluster) if reset else []
        try:
            created = await topology.init(bus, settings.cluster)
        except WireMismatch as error:
            raise error.in_store(store) from None
        return Made(deleted, created, await topology.apply(bus, settings.cluster))
