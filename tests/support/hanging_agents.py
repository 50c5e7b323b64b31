"""Agents that would go on for ever."""

import asyncio
import threading
import time

from loom.schemas.run import RunRequest

WITHIN_S = 20  # a test that fails before `over` must not hang


class Stubborn:
    """Agents that do not end by themselves, each stubborn in its own way, and a quick one; what they are at is kept."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.stopped: dict[str, float] = {}
        """task -> when its run was"""
        self.over = threading.Event()

    async def endless(self, job: RunRequest) -> str:
        self.begun.append(job.task_id)
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped[job.task_id] = time.monotonic()
        return "never"

    async def deaf(self, job: RunRequest) -> str:
        self.begun.append(job.task_id)
        until = time.monotonic() + WITHIN_S
        while not self.over.is_set() and time.monotonic() < until:
            try:
                await asyncio.sleep(0.2)
            except asyncio.CancelledError:
                continue  # as an agent does that swallows what it should not
        return "much too late"

    def threaded(self, job: RunRequest) -> str:
        self.begun.append(job.task_id)
        self.over.wait(WITHIN_S)
        return "too late"

    async def quick(self, job: RunRequest) -> str:
        self.begun.append(job.task_id)
        return "done"
