"""`loom backup` and `loom restore`: a busy cluster is saved, and continues elsewhere."""

import json
import secrets
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from support.in_process import Loom, is_refused
from support.nodes import echo, node
from support.services import running_phases
from support.wait import until

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.dead_letters import admin
from loom.bus.natsio.server_errors import Refused
from loom.bus.wire_version import WIRE, WireMismatch
from loom.runner.backup import cluster_backup
from loom.runner.backup.cluster_backup import InvalidBackup, StreamsExist, backup, read_manifest, restore
from loom.runner.server.nats_server import embedded_server
from loom.runner.services import running_nodes
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import PHASES
from loom.schemas.record import TaskRecord
from loom.schemas.task import TaskAd

CONFIG = ClusterConfig()
PLAN = [{"id": "top", "description": "read"}, {"id": "end", "description": "close", "dependencies": ["top"]}]
WAITING = [f"waiting-{number}" for number in range(20)]
WITHOUT_MATCH = tuple(phase for phase in PHASES if phase != "match")


@pytest.fixture
async def empty_server(tmp_path: Path) -> AsyncIterator[str]:
    """The address of a separate server."""
    async with embedded_server(tmp_path / "second") as server:
        yield server.url


async def work(bus: Bus) -> None:
    """End a task and a divided task, and leave a dead letter."""
    for ad in (
        TaskAd(task_id="done", domain="code", description="x"),
        TaskAd(task_id="divided", domain="code", description="y", context={"plan": PLAN}),
    ):
        handle = await task_client.publish(bus, ad)
        assert (await handle.result(20)).success
        await handle.close()
    await bus.jetstream.publish(bus.subjects.task("match", "normal", "broken"), b"\xff")
    await until(lambda: admin.list_letters(bus, 10), what="a dead letter")


async def wait_for_match(bus: Bus) -> None:
    """Submit tasks that stop at MATCH."""
    for task_id in WAITING:
        await (await task_client.publish(bus, TaskAd(task_id=task_id, domain="code", description=task_id))).close()

    async def all_wait() -> bool:
        state = (await bus.jetstream.api(f"CONSUMER.INFO.{bus.subjects.stream('TASKS')}.match_normal"))["num_pending"]
        return bool(state == len(WAITING))

    await until(all_wait, what="all wait for MATCH")


async def contents(bus: Bus, name: str) -> list[tuple[int, str, str]]:
    """Return sequence, subject and body of every message of a stream."""
    state = (await bus.jetstream.api(f"STREAM.INFO.{name}"))["state"]
    messages = []
    for seq in range(state["first_seq"], state["last_seq"] + 1):
        try:
            message = (await bus.jetstream.api(f"STREAM.MSG.GET.{name}", {"seq": seq}))["message"]
        except Refused:
            continue  # removed, or replaced by a newer value
        messages.append((seq, message["subject"], message.get("data", "")))
    return messages


async def ended(bus: Bus, task_id: str) -> TaskRecord | None:
    record = await task_client.record(bus, task_id)
    return record if record is not None and record.ended else None


@pytest.mark.slow
async def test_a_busy_cluster_is_saved_and_its_waiting_tasks_end_on_an_empty_server(
    nats_url: str, namespace: str, empty_server: str, tmp_path: Path
) -> None:
    folder, nodes = tmp_path / "backup", [node("n", echo, code=0.9)]
    async with Bus(nats_url, namespace=namespace, role="operator") as bus:
        async with (
            running_phases(nats_url, namespace=namespace),
            running_nodes(nats_url, lambda: nodes, namespace=namespace),
        ):
            await work(bus)
        async with running_phases(nats_url, namespace=namespace, names=WITHOUT_MATCH):
            await wait_for_match(bus)
            names: list[str] = []
            manifest = await backup(bus, folder, CONFIG, lambda saved: names.append(saved.name))
        source = {name: await contents(bus, name) for name in names}

    async with Bus(empty_server, namespace=namespace, role="operator") as bus:
        assert await restore(bus, folder, CONFIG, lambda _: None) == manifest
        restored = {name: await contents(bus, name) for name in names}
        assert restored == source
        assert len(await admin.list_letters(bus, 10)) == 1
        assert all(len(restored[f"KV_{bus.subjects.bucket(name)}"]) for name in ("plans", "records", "nodes"))
        with pytest.raises(StreamsExist, match="restore into an empty server"):
            await restore(bus, folder, CONFIG, lambda _: None)
        async with (
            running_phases(empty_server, namespace=namespace),
            running_nodes(empty_server, lambda: nodes, namespace=namespace),
        ):
            records = [
                await until(partial(ended, bus, task_id), within_s=40, what=f"{task_id} ended") for task_id in WAITING
            ]
    assert {record.state for record in records} == {"succeeded"}


async def test_a_backup_names_its_namespace_wire_server_and_time(
    nats_url: str, namespace: str, empty_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "backup"
    async with (
        Bus(nats_url, namespace=namespace, role="operator") as bus,
        running_phases(nats_url, namespace=namespace),
    ):
        manifest = await backup(bus, folder, CONFIG, lambda _: None)
        with pytest.raises(InvalidBackup, match="is not empty"):
            await backup(bus, folder, CONFIG, lambda _: None)
    assert read_manifest(folder) == manifest
    assert (manifest.namespace, manifest.wire) == (namespace, WIRE)
    assert manifest.server.startswith("2.")
    assert folder.stat().st_mode & 0o777 == 0o700

    async with Bus(empty_server, namespace="elsewhere", role="operator") as bus:
        with pytest.raises(InvalidBackup, match=f"set LOOM_NAMESPACE={namespace}"):
            await restore(bus, folder, CONFIG, lambda _: None)
    async with Bus(empty_server, namespace=namespace, role="operator") as bus:
        monkeypatch.setattr(cluster_backup, "WIRE", "9")
        with pytest.raises(WireMismatch):
            await restore(bus, folder, CONFIG, lambda _: None)


async def test_a_restore_that_fails_leaves_no_streams(
    nats_url: str, namespace: str, empty_server: str, tmp_path: Path
) -> None:
    folder = tmp_path / "backup"
    async with (
        Bus(nats_url, namespace=namespace, role="operator") as bus,
        running_phases(nats_url, namespace=namespace),
    ):
        manifest = await backup(bus, folder, CONFIG, lambda _: None)
    broken = folder / manifest.streams[2].file
    broken.write_bytes(b"x" * broken.stat().st_size)

    async with Bus(empty_server, namespace=namespace, role="operator") as bus:
        with pytest.raises(Refused):
            await restore(bus, folder, CONFIG, lambda _: None)
        assert (await bus.jetstream.api("STREAM.NAMES"))["total"] == 0


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "manifest.json: No such file or directory"),
        ({"manifest.json": "{"}, "manifest.json cannot be read"),
        ({"manifest.json": json.dumps({"format": 2})}, "manifest.json cannot be read"),
    ],
)
def test_a_folder_that_is_not_a_backup_is_refused(files: dict[str, str], reason: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    with pytest.raises(InvalidBackup, match=reason):
        read_manifest(tmp_path)


@pytest.mark.slow
def test_the_commands_save_and_restore_a_store(tmp_path: Path, loom: Loom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOM_NAMESPACE", namespace := f"t{secrets.token_hex(4)}")
    monkeypatch.delenv("NATS_URL", raising=False)
    first, second, folder = tmp_path / "first", tmp_path / "second", tmp_path / "backup"
    first.mkdir()
    assert loom(f"init --store {first}").code == 0

    saved = loom(f"backup {folder} --store {first}")
    restored = loom(f"restore {folder} --store {second}")

    assert (saved.code, restored.code) == (0, 0), (saved, restored)
    assert len(saved.out.splitlines()) == 9
    assert restored.out.splitlines()[-1].startswith(f"restored namespace {namespace} as of 20")
    is_refused(loom, f"backup {folder} --store {first}", 2, "invalid_backup: ")
    again = loom(f"restore {folder} --store {second}")
    assert (again.code, again.out) == (2, "")
    assert again.err.startswith(f"streams_exist: namespace {namespace} has streams already")
