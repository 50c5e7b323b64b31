"""The event loop of the benchmark's processes, with the settings of the `loom` command."""

import asyncio
import gc
import importlib
import importlib.util
from collections.abc import Coroutine
from typing import Any

THRESHOLDS = (50_000, 20, 50)
"""Thresholds of the garbage collector in the services of loom."""


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end, with uvloop where it is installed."""
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    factory = importlib.import_module("uvloop").new_event_loop if importlib.util.find_spec("uvloop") else None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(work)
