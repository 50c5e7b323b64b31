"""Processes that stand still for a while."""

import os
import signal
import time
from pathlib import Path


def stop(pid: int) -> None:
    """Stop a process; returns once none of its threads runs. The signal alone leaves them some more work."""
    os.kill(pid, signal.SIGSTOP)
    until = time.monotonic() + 10
    while any(_state(thread) not in "TtZX" for thread in Path(f"/proc/{pid}/task").glob("*/stat")):
        assert time.monotonic() < until, f"process {pid} does not stop"
        time.sleep(0.001)


def _state(stat: Path) -> str:
    try:
        return stat.read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
        return "X"
