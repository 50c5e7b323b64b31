"""A store that ends with its owner."""

import os
import secrets
import shutil
import tempfile
import weakref
from pathlib import Path

from loom.runner.server.nats_server import stop_all_on


class TemporaryStore:
    """A folder that is removed with this object, at the latest at the end of its program; the first server makes it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.gettempdir()) / f"loom-store-{secrets.token_hex(8)}"
        self._pid = os.getpid()
        self.remove = weakref.finalize(self, _remove, self.folder, self._pid)

    @property
    def is_inherited(self) -> bool:
        """Whether this process is a forked child: the folder is its parent's."""
        return self._pid != os.getpid()


def _remove(folder: Path, pid: int) -> None:
    if pid == os.getpid():
        stop_all_on(folder)  # it would go on to write there
        shutil.rmtree(folder, ignore_errors=True)
