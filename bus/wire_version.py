"""The version of the wire: of the subjects, streams and messages that processes must share to work together.

It is metadata of every stream and bucket, and of every process in `$SRV.INFO`. Streams and processes of another
version are refused: a consumer created on an older stream would never deliver that stream's messages.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from loom.schemas.errors import LoomError

WIRE: Final = "1"
"""The version of this installation. It changes when older and newer processes cannot work together."""
WIRE_KEY: Final = "loom.wire"
"""Key of the metadata entry with the version."""
RESET: Final = "loom init --reset"


class WireMismatch(LoomError):
    """A stream, a bucket or a running process has another wire version; waiting does not help.

    Args:
        subject: The stream, bucket or process, for example `stream LOOM_TASKS`.
        version: Its version; empty if it has none.
        todo: What the operator should do; default: finish the tasks and delete the streams.
    """

    code = "wire_mismatch"

    def __init__(self, subject: str, version: str, todo: str = "") -> None:
        todo = todo or f"finish its tasks with that version, then `{RESET}`, or choose another LOOM_NAMESPACE"
        super().__init__(
            f"{subject} has {f'wire version {version}' if version else 'no wire version'}, not {WIRE}: {todo}"
        )

    def in_store(self, folder: Path | None) -> Self:
        """Add the folder to `loom init --reset` in the message, for a server that only this process runs."""
        if folder is not None:
            self.message = self.message.replace(RESET, f"{RESET} --store {shlex.quote(str(folder))}")
            self.args = (self.message,)
        return self


def wire_of(config: Mapping[str, Any]) -> str:
    """Return the wire version in a stream's configuration; empty if it has none."""
    metadata = config.get("metadata")
    return str(metadata.get(WIRE_KEY, "")) if isinstance(metadata, dict) else ""


def check_stream(name: str, config: Mapping[str, Any]) -> None:
    """Check that a stream has the wire version of this installation.

    Raises:
        WireMismatch: It has another version, or none.
    """
    version = wire_of(config)
    if version != WIRE:
        kind, _, bucket = name.partition("KV_")
        raise WireMismatch(f"stream {name}" if kind else f"bucket {bucket}", version)
