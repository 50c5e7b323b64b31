"""The folder in which a server started here keeps its streams: where it is, and who has it."""

import errno
import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from loom.bus.logs.logger import get_logger
from loom.schemas.errors import BusUnavailable

log = get_logger()

LOCK: Final = "loom.lock"
"""Locked while a server has the folder; holds who that is, and the version of the server that wrote it last."""
LOCK_POLL_S: Final = 0.02
_DAMAGE: Final = re.compile(
    r"\[(?:WRN|ERR)\]\s+("
    r"Stream metafile .*checksums do not match.*|Error unmarshalling stream metafile.*|Error reading metafile.*"
    r"|Error reading Stream metafile.*|Error recreating stream.*|.*unsupported - required API level.*)"
)
"""What nats-server logs about a stream that it leaves out because it cannot read it, and does not repair."""


def default_store(namespace: str, environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """Return the folder of a namespace in the user's data folder, by the rules of the platform.

    Raises:
        BusUnavailable: The user has no home folder.
    """
    try:
        home = Path.home()
    except RuntimeError:
        raise BusUnavailable("there is no home folder to keep streams in; name a folder with --store") from None
    given = environment.get("LOCALAPPDATA" if platform == "win32" else "XDG_DATA_HOME", "")
    if platform == "darwin":
        data = home / "Library" / "Application Support"
    elif Path(given).is_absolute():  # a relative one is to be ignored
        data = Path(given)
    else:
        data = home / "AppData" / "Local" if platform == "win32" else home / ".local" / "share"
    return data / "loom" / namespace


class StoreLock:
    """The lock of one folder of streams. Two servers on one folder would destroy each other's streams.

    The lock belongs to the open file, which the server's processes inherit. It ends with the last of them, so that a
    lock file left behind locks nothing.

    Args:
        store: The folder, made if it is missing, for this user alone.
        version: Version of the server that is to have it.
        patience_s: Seconds to wait for the server of a process that has ended: its guard is about to end it.

    Raises:
        BusUnavailable: Another server has the folder, a newer one wrote it, or it cannot be written.
    """

    def __init__(self, store: Path, version: tuple[int, int], *, patience_s: float) -> None:
        try:
            store.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.fd = os.open(store / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            raise BusUnavailable(f"cannot keep streams in {store}: {reason}; choose another folder") from error
        try:
            _lock(self.fd, store, patience_s)
            self._facts = _read(self.fd)
            self._check_version(store, version)
            self._facts = {"version": list(version), "pid": os.getpid()}
            self._write()
        except BaseException:
            self.close()
            raise

    def name_server(self, address: str) -> None:
        """Record where the server listens, for those who find the folder locked."""
        self._facts["server"] = address
        self._write()

    def close(self) -> None:
        """Close this process's copy of the lock."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _check_version(self, store: Path, version: tuple[int, int]) -> None:
        written = self._facts.get("version")
        if isinstance(written, list) and written > list(version):
            dotted, own = (".".join(map(str, each)) for each in (written, version))
            raise BusUnavailable(
                f"the streams in {store} were written by nats-server {dotted}, and nats-server {own} may not be able "
                f"to read them: install {dotted} or later, or choose another folder"
            )

    def _write(self) -> None:
        text = json.dumps(self._facts).encode()
        with suppress(OSError):  # a full disk; only words for others are lost
            os.ftruncate(self.fd, os.pwrite(self.fd, text, 0))


def check_unused(store: Path) -> None:
    """Return if no server has the folder, or the process that started it has ended.

    Raises:
        BusUnavailable: A server has it; the message names the process and the server's address.
    """
    try:
        fd = os.open(store / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # not there yet, or unreadable: the start finds out
        return
    try:
        _lock(fd, store, float("inf"), wait=False)
    finally:
        os.close(fd)


def _lock(fd: int, store: Path, patience_s: float, *, wait: bool = True) -> None:
    """Lock an open lock file, waiting only for the server of a process that has ended."""
    give_up = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read(fd)
            if _lives(owner.get("pid")) or time.monotonic() >= give_up:
                raise BusUnavailable(_in_use(store, owner)) from None
        except OSError as error:
            raise BusUnavailable(f"cannot lock {store}: {error.strerror}; choose another folder") from error
        else:
            return
        if not wait:
            return
        time.sleep(LOCK_POLL_S)


def _in_use(store: Path, owner: Mapping[str, object]) -> str:
    server = owner.get("server")
    whose = f" of process {owner['pid']}" if "pid" in owner else ""
    at = f" at {server}: set NATS_URL={server} to use it" if server else ": stop that one"
    return f"{store} is in use by the server{whose}{at}, or choose another folder"


def _read(fd: int) -> dict[str, object]:
    """Return what the lock file holds; nothing where it was never written in full."""
    try:
        facts = json.loads(os.pread(fd, 4096, 0) or b"{}")
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _lives(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def log_store(store: Path | None) -> None:
    """Log where records and what is learned are kept; None: in a temporary folder."""
    if store is None:
        log.info("store_temporary", hint="records and what is learned end with the server; name a store to keep them")
    else:
        log.info("store_opened", folder=str(store.absolute()))


def log_unused_store(store: Path, server: str) -> None:
    """Log that a store which was asked for is not used, as the streams are those of another server."""
    log.warning("store_not_used", folder=str(store.absolute()), hint=f"{server} keeps records and what is learned")


def damage_in(log: str) -> str | None:
    """Return the first line of a server's log that reports a stream it could not read; None where there is none."""
    found = _DAMAGE.search(log)
    return found[1].strip() if found else None
