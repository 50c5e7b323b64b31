"""`loom backup` and `loom restore`."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer

from loom.bus.bus import Bus
from loom.runner.backup.cluster_backup import Manifest, SavedStream
from loom.runner.backup.cluster_backup import backup as save_cluster
from loom.runner.backup.cluster_backup import restore as restore_cluster
from loom.runner.cli.common import check_one_server, server_of
from loom.runner.cli.entry import prepare, run_to_end
from loom.runner.settings import Settings
from loom.schemas.config import ClusterConfig

EXAMPLES = """
    loom backup backups/monday
    loom restore backups/monday
    loom restore backups/monday --store ~/loom-data
"""
Work = Callable[[Bus, Path, ClusterConfig, Callable[[SavedStream], None]], Awaitable[Manifest]]
Store = Annotated[
    Path | None,
    typer.Option(metavar="DIR", file_okay=False, help="Store folder of a `loom up` that is not running."),
]


def backup(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")], store: Store = None
) -> None:
    """Save all streams and buckets of the namespace into a folder, while the cluster works."""
    if store is not None and not store.is_dir():
        raise typer.BadParameter(f"there is no folder {store}", param_hint="--store")
    manifest = _run(save_cluster, folder, store)
    typer.echo(f"saved namespace {manifest.namespace} in {manifest.duration_s:.1f} s to {folder}")


def restore(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a backup.")], store: Store = None
) -> None:
    """Create all streams and buckets of a backup on a server that has none of them."""
    manifest = _run(restore_cluster, folder, store)
    typer.echo(f"restored namespace {manifest.namespace} as of {manifest.at}")


def _run(work: Work, folder: Path, store: Path | None) -> Manifest:
    settings = prepare("warning")
    check_one_server(settings, store)
    return run_to_end(_on_server(settings, work, folder, store))


async def _on_server(settings: Settings, work: Work, folder: Path, store: Path | None) -> Manifest:
    async with (
        server_of(settings, store) as url,
        Bus(url, namespace=settings.loom_namespace, role="operator", identity=settings.identity) as bus,
    ):
        return await work(bus, folder, settings.cluster, _report)


def _report(saved: SavedStream) -> None:
    typer.echo(f"{saved.name:<24} {saved.messages} messages, {saved.size} bytes")
