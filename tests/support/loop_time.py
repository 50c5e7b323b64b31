"""CPU time of single callbacks of the event loop."""

import asyncio
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass
class Longest:
    """The callback that has used most CPU time of the loop's thread."""

    seconds: float = 0.0
    callback: str = ""


@contextmanager
def longest_callback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Longest]:
    """Yield the longest callback so far of every loop of plain asyncio; the suite's garbage waits meanwhile."""
    longest, run = Longest(), asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        spent = time.thread_time() - began
        if spent > longest.seconds:
            longest.seconds, longest.callback = spent, repr(handle)

    with monkeypatch.context() as patch:
        patch.setattr(asyncio.Handle, "_run", timed)
        gc.disable()
        try:
            yield longest
        finally:
            gc.enable()
