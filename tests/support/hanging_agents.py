"""Agents that do not return by themselves."""

import asyncio
import threading
import time

from loom.schemas.run import RunRequest

WITHIN_S = 20  # a test that fails before it sets `released` must not hang


class HangingAgents:
    """Agents that hang, each in its own way, and one that returns at once; their starts and stops are recorded."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.stopped: dict[str, float] = {}
        """Task id -> when its run was cancelled (monotonic clock)."""
        self.released = threading.Event()

    async def endless(self, job: RunRequest) -> str:
        self.started.append(job.task_id)
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped[job.task_id] = time.monotonic()
        return "never"

    async def ignores_cancel(self, job: RunRequest) -> str:
        self.started.append(job.task_id)
        until = time.monotonic() + WITHIN_S
        while not self.released.is_set() and time.monotonic() < until:
            try:
                await asyncio.sleep(0.2)
            except asyncio.CancelledError:
                continue  # an agent that swallows its cancellation
        return "much too late"

    def threaded(self, job: RunRequest) -> str:
        self.started.append(job.task_id)
        self.released.wait(WITHIN_S)
        return "too late"

    async def quick(self, job: RunRequest) -> str:
        self.started.append(job.task_id)
        return "done"
