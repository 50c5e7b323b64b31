"""All streams and buckets of a namespace, saved into a folder and restored from it.

Streams are saved one after the other while the cluster works. Their order keeps a backup consistent: tasks are saved
before their records, and profiles before the rewards from which they are rebuilt.
"""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from loom.bus.bus import Bus
from loom.bus.natsio.server_errors import Refused, ServerErrorCode
from loom.bus.topology import check_version, streams
from loom.bus.wire_version import WIRE, WireMismatch
from loom.runner.backup.stream_snapshots import StreamSnapshot, restore_stream, save_stream
from loom.schemas.base import CheckedMessage, decode
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import BusUnavailable, LoomError

MANIFEST = "manifest.json"
"""File that describes a backup; written last, so that a folder without it is not a backup."""
FORMAT = 1
MAX_MANIFEST_BYTES = 2**20
ORDER = ("INTAKE", "TASKS", "plans", "records", "DEAD", "nodes", "tuning", "REWARDS")
"""Streams and buckets in the order in which they are saved."""


class InvalidBackup(LoomError):
    """A folder is not a backup that can be restored here, or cannot take a backup."""

    code = "invalid_backup"


class StreamsExist(LoomError):
    """The namespace has streams already, and a restore would mix two clusters."""

    code = "streams_exist"


class SavedStream(CheckedMessage, frozen=True, kw_only=True):
    """One stream of a backup."""

    name: str
    file: str
    size: int
    """Bytes of the file."""
    messages: int
    snapshot: dict[str, Any]
    """Configuration and state, as the server needs them."""


class Manifest(CheckedMessage, frozen=True, kw_only=True):
    """What a backup holds."""

    format: int = FORMAT
    namespace: str
    wire: str
    server: str
    """Version of the nats-server that wrote the snapshots."""
    at: str
    """When the backup began, RFC 3339."""
    duration_s: float
    streams: tuple[SavedStream, ...]


async def backup(bus: Bus, folder: Path, config: ClusterConfig, report: Callable[[SavedStream], None]) -> Manifest:
    """Save every stream and bucket of the namespace into a folder.

    Args:
        folder: Created if it is missing, for the user alone; must be empty.
        report: Called with each stream that has been saved.

    Raises:
        InvalidBackup: The folder is not empty or cannot be written.
        BusUnavailable: No phase has ever run here, the server does not answer, or a snapshot is incomplete.
    """
    at, begin = datetime.now(UTC), time.monotonic()
    try:
        _create_folder(folder)
        saved = []
        for name in _names(bus, config):
            saved.append(await _save(bus, name, folder))
            report(saved[-1])
        manifest = Manifest(
            namespace=bus.subjects.namespace,
            wire=WIRE,
            server=".".join(map(str, bus.connection.server_version)),
            at=at.isoformat(timespec="seconds"),
            duration_s=round(time.monotonic() - begin, 3),
            streams=tuple(saved),
        )
        (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
    except OSError as error:
        raise InvalidBackup(f"{error.filename or folder}: {error.strerror}") from error
    return manifest


def _create_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InvalidBackup(f"{folder} is not empty: choose a new folder")


def _names(bus: Bus, config: ClusterConfig) -> list[str]:
    """Return the names of the namespace's streams, in the order in which they are saved."""
    names = {name: bus.subjects.stream(name) if name.isupper() else f"KV_{bus.subjects.bucket(name)}" for name in ORDER}
    others = {str(stream["name"]) for stream in streams(bus, config)} - set(names.values())
    return [*names.values(), *sorted(others)]


async def _save(bus: Bus, name: str, folder: Path) -> SavedStream:
    path = folder / f"{name}.snapshot"
    try:
        snapshot = await save_stream(bus, name, path)
    except Refused as error:
        if error.err_code == ServerErrorCode.STREAM_NOT_FOUND:
            raise BusUnavailable(f"stream {name} is missing, so there is no whole cluster to save") from error
        raise
    return SavedStream(
        name=name,
        file=path.name,
        size=path.stat().st_size,
        messages=snapshot.state.get("messages", 0),
        snapshot=msgspec.to_builtins(snapshot),
    )


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a backup whose files are complete.

    Raises:
        InvalidBackup: The folder is not a backup, or a file is missing or cut.
    """
    try:
        manifest = decode((folder / MANIFEST).read_bytes(), Manifest, limit=MAX_MANIFEST_BYTES)
        if manifest.format != FORMAT:
            raise InvalidBackup(f"{folder} has backup format {manifest.format}, not {FORMAT}")
        for saved in manifest.streams:
            if Path(saved.file).name != saved.file or (folder / saved.file).stat().st_size != saved.size:
                raise InvalidBackup(f"{folder / saved.file} does not have the {saved.size} bytes of the manifest")
    except OSError as error:
        raise InvalidBackup(f"{error.filename or folder}: {error.strerror}") from error
    except LoomError as error:
        if isinstance(error, InvalidBackup):
            raise
        raise InvalidBackup(f"{folder / MANIFEST} cannot be read: {error.message}") from error
    return manifest


async def restore(bus: Bus, folder: Path, config: ClusterConfig, report: Callable[[SavedStream], None]) -> Manifest:
    """Create every stream and bucket of a backup; when one fails, those that were created are deleted again.

    Args:
        report: Called with each stream that has been restored.

    Raises:
        InvalidBackup: The folder is not a backup of this namespace.
        WireMismatch: The backup has another wire version.
        StreamsExist: The server has a stream of the namespace.
        BusUnavailable: The server is too old or does not answer.
        Refused: The server refused a snapshot.
    """
    check_version(bus)
    manifest = read_manifest(folder)
    if manifest.namespace != bus.subjects.namespace:
        raise InvalidBackup(
            f"{folder} is a backup of namespace {manifest.namespace}: set LOOM_NAMESPACE={manifest.namespace}"
        )
    if manifest.wire != WIRE:
        raise WireMismatch(f"backup {folder}", manifest.wire, "restore it with a loom of that wire version")
    if existing := await _existing(bus, [*_names(bus, config), *(saved.name for saved in manifest.streams)]):
        raise StreamsExist(
            f"namespace {manifest.namespace} has streams already ({', '.join(existing)}): "
            "restore into an empty server, before any `loom init`, `loom up` or `loom phase run` has created them"
        )
    restored: list[str] = []
    try:
        for saved in manifest.streams:
            snapshot = msgspec.convert(saved.snapshot, StreamSnapshot)
            await restore_stream(bus, saved.name, snapshot, folder / saved.file)
            restored.append(saved.name)
            report(saved)
    except BaseException:
        for name in restored:
            await bus.jetstream.api(f"STREAM.DELETE.{name}")
        raise
    return manifest


async def _existing(bus: Bus, names: Sequence[str]) -> list[str]:
    existing = []
    for name in dict.fromkeys(names):
        try:
            await bus.jetstream.api(f"STREAM.INFO.{name}")
        except Refused as error:
            if error.err_code != ServerErrorCode.STREAM_NOT_FOUND:
                raise
        else:
            existing.append(name)
    return existing
