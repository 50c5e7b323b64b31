"""The store of a server's streams: its folder, its lock and its version."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.logs import capture_logs

from loom.runner.server.listening import is_loopback, reachable
from loom.runner.server.store import LOCK, StoreLock, check_unused, damage_in, default_store, log_store
from loom.runner.server.temporary_store import TemporaryStore
from loom.schemas.errors import BusUnavailable

VERSION = (2, 15)

HOLDER = """
import sys, time
from pathlib import Path
from loom.runner.server.store import StoreLock

lock = StoreLock(Path(sys.argv[1]), (2, 15), patience_s=0)
lock.name_server("nats://127.0.0.1:9")
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has locked the folder `store`."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "store")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("platform", "environment", "folder"),
    [
        ("linux", {}, ".local/share/loom/team"),
        ("linux", {"XDG_DATA_HOME": "relative"}, ".local/share/loom/team"),
        ("darwin", {"XDG_DATA_HOME": "/ignored"}, "Library/Application Support/loom/team"),
        ("win32", {}, "AppData/Local/loom/team"),
    ],
)
def test_the_default_store_is_in_the_users_data_folder(platform: str, environment: dict[str, str], folder: str) -> None:
    assert default_store("team", environment, platform) == Path.home() / folder


def test_the_default_store_follows_xdg_data_home() -> None:
    assert default_store("team", {"XDG_DATA_HOME": "/data"}, "linux") == Path("/data/loom/team")


def test_a_store_is_made_for_its_user_alone(tmp_path: Path) -> None:
    StoreLock(tmp_path / "above" / "store", VERSION, patience_s=0).close()

    assert (tmp_path / "above" / "store").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "above" / "store" / LOCK).stat().st_mode & 0o777 == 0o600


def test_a_locked_store_is_refused_with_the_process_and_the_address_of_its_server(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    store = tmp_path / "store"
    words = rf"{store} is in use by the server of process {holder.pid} at nats://127.0.0.1:9: set NATS_URL"
    with pytest.raises(BusUnavailable, match=words):
        StoreLock(store, VERSION, patience_s=10)
    with pytest.raises(BusUnavailable, match=words):
        check_unused(store)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    holder.kill()
    holder.wait()

    check_unused(tmp_path / "store")
    StoreLock(tmp_path / "store", VERSION, patience_s=0).close()


def test_a_lock_file_with_garbage_is_replaced(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(b'{"version": "x\xff')

    StoreLock(tmp_path, VERSION, patience_s=0).close()
    check_unused(tmp_path)


def test_a_store_that_was_never_used_is_unused(tmp_path: Path) -> None:
    check_unused(tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_streams_of_a_newer_server_are_refused_and_those_of_an_older_one_reused(tmp_path: Path) -> None:
    StoreLock(tmp_path, (2, 12), patience_s=0).close()
    StoreLock(tmp_path, (2, 15), patience_s=0).close()

    with pytest.raises(
        BusUnavailable, match=r"written by nats-server 2\.15, and nats-server 2\.12 may not.*install 2\.15"
    ):
        StoreLock(tmp_path, (2, 12), patience_s=0)


def test_a_store_that_cannot_be_a_folder_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(BusUnavailable, match=r"cannot keep streams in .*: Not a directory; choose another folder"):
        StoreLock(tmp_path / "file" / "store", VERSION, patience_s=0)


@pytest.mark.parametrize(
    ("line", "damage"),
    [
        ('[WRN]   Stream metafile "/s/meta.inf": checksums do not match', 'Stream metafile "/s/meta.inf": checksums'),
        ('[WRN]   Error unmarshalling stream metafile "/s/meta.inf": EOF', "Error unmarshalling stream metafile"),
        ("[WRN] Filestore [S] Recovering stream state from index errored: corrupt state", None),
        ('[WRN]   Missing stream metafile for "/s"', None),
        ("[INF] Server is ready", None),
    ],
)
def test_damage_is_found_in_the_log_of_the_server(line: str, damage: str | None) -> None:
    found = damage_in(f"[1] [INF] Starting nats-server\n[1] {line}\n[1] [INF] Server is ready\n")

    assert found is None if damage is None else found is not None and found.startswith(damage)


def test_a_temporary_store_goes_with_its_owner_and_not_with_a_forked_child() -> None:
    store = TemporaryStore()
    folder = store.folder
    StoreLock(folder, VERSION, patience_s=0).close()
    if (child := os.fork()) == 0:
        store.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.is_dir()

    del store
    assert not folder.exists()


def test_each_start_logs_the_folder_of_the_store(tmp_path: Path) -> None:
    with capture_logs() as logs:
        log_store(tmp_path)
        log_store(None)

    assert [(line["event"], line.get("folder")) for line in logs] == [
        ("store_opened", str(tmp_path)),
        ("store_temporary", None),
    ]


@pytest.mark.parametrize(
    ("host", "alone", "address"),
    [
        ("127.0.0.1", True, "127.0.0.1"),
        ("::1", True, "[::1]"),
        ("localhost", True, "localhost"),
        ("0.0.0.0", False, "127.0.0.1"),
        ("::", False, "[::1]"),
        ("192.0.2.1", False, "192.0.2.1"),
        ("myself.example", False, "myself.example"),
    ],
)
def test_an_address_is_known_to_be_of_this_machine_alone_and_has_one_for_its_clients(
    host: str, alone: bool, address: str
) -> None:
    assert (is_loopback(host), reachable(host)) == (alone, address)
