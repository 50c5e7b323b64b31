"""The asyncio tasks of a connection; the failure of an essential one ends the process."""

import asyncio
from typing import Any

from loom.bus.logs.log_fields import error_fields, summary
from loom.bus.logs.logger import get_logger
from loom.schemas.errors import LoomError

log = get_logger()

END_S = 5.0
"""Seconds to wait for the end of cancelled tasks."""


class ServiceFailed(LoomError):
    """An essential task of the process has ended with an exception."""

    code = "service_failed"


class BackgroundTasks:
    """Starts asyncio tasks, keeps references to them, and cancels them together."""

    def __init__(self) -> None:
        self.lost = asyncio.Event()
        """Set when the connection is closed for good or an essential task has failed: the process should end."""
        self.failure = ""
        """Name and error of the essential task that failed first."""
        self.ending = False
        """Whether the tasks are being cancelled on purpose; a failure then does not set `lost`."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._essential: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Any, *, name: str, essential: bool = False) -> asyncio.Task[Any]:
        """Start a task for a coroutine; it is cancelled when the connection is closed.

        Args:
            name: Name of the task, for logs.
            essential: Whether the process must end if the task raises: an exception then sets `lost`.
        """
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        if essential:
            self._essential.add(task)
        task.add_done_callback(self._on_done)
        return task

    def running(self) -> list[asyncio.Task[Any]]:
        """Return the tasks that have not ended."""
        return [task for task in self._tasks if not task.done()]

    async def end(self) -> None:
        """Cancel all tasks except the current one, and wait up to five seconds for their end."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=END_S)  # user code may ignore its cancellation
            for task in left:
                log.warning("task_left_behind", task=task.get_name())

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        essential = task in self._essential
        self._essential.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        log.error(
            "essential_task_failed" if essential else "bus_task_failed", task=task.get_name(), **error_fields(error)
        )
        if essential and not self.ending:
            self.failure = self.failure or f"{task.get_name()}: {summary(error)}"
            self.lost.set()
