"""What tools need open while they may be called: a connection, a session, a process."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeVar

from loom.agents.user_code import contain, error_fields, type_name
from loom.bus.logs.logger import get_logger
from loom.schemas.errors import LoomError

CLOSE_S = 5.0
"""Seconds a context manager may take to close before it is cancelled."""

T = TypeVar("T")

log = get_logger()


class Lifespan(Generic[T]):
    """An async context manager that is open from the first `start` to the last `close`, in a task of its own.

    Several tools may share one. A context manager that has to be left by the task that entered it is suitable.

    Args:
        open_: Makes the context manager; called for each opening, and again where the one before has failed.
        name: What it is, for messages.
    """

    def __init__(
        self, open_: Callable[[], AbstractAsyncContextManager[T]], *, name: str = "the tool's resource"
    ) -> None:
        self.name = name
        self._open = open_
        self._users = 0
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def value(self) -> T:
        """What the context manager returned when it was entered.

        Raises:
            LoomError: It is not open.
        """
        if self._task is None or self._task.done() or not self._ready.done():
            raise LoomError(f"{self.name} is not open")
        return self._ready.result()

    async def start(self) -> None:
        """Open it, or wait until it is open.

        Raises:
            LoomError: It cannot be opened.
        """
        self._users += 1
        try:
            await self.ready()
        except BaseException:
            await self.close()
            raise

    async def ready(self) -> None:
        """Return once it is open; one that has ended since `start` is opened again.

        Raises:
            LoomError: It cannot be opened, or nothing has started it.
        """
        if not self._users:
            raise LoomError(f"{self.name} is not open: run the agent on a node, or inside `async with agent`")
        if self._task is None or self._task.done():
            self._ready: asyncio.Future[T] = asyncio.get_running_loop().create_future()
            self._closing = asyncio.Event()
            self._task = asyncio.create_task(self._hold(self._ready, self._closing))
        await asyncio.shield(self._ready)

    def reopen(self) -> None:
        """Close what is open and let the next call open it again: for a call that finds a connection lost."""
        task, closing = self._task, self._closing
        self._task = None
        if task is not None and not task.done():
            self._leaving.add(task)
            task.get_loop().call_soon_threadsafe(closing.set)  # a sync call runs in a thread

    async def close(self) -> None:
        """Close it, if no other user is left; what has not ended after 5 s is cancelled."""
        self._users = max(0, self._users - 1)
        if self._users:
            return
        opening = self._task is not None and not self._ready.done()
        self.reopen()
        leaving = set(self._leaving)
        if leaving and not opening:
            await asyncio.wait(leaving, timeout=CLOSE_S)
        unfinished = {task for task in leaving if task.cancel()}
        if unfinished:
            await asyncio.wait(unfinished, timeout=CLOSE_S)
        if not all(task.done() for task in leaving):
            log.warning("tool_resource_left_open", resource=self.name)

    async def _hold(self, ready: "asyncio.Future[T]", closing: asyncio.Event) -> None:
        try:
            with contain():
                async with self._open() as value:
                    ready.set_result(value)
                    await closing.wait()
        except Exception as error:  # noqa: BLE001 - a user's context manager may raise anything
            log.warning("tool_resource_failed", resource=self.name, **error_fields(error))
            if not ready.done():
                ready.set_exception(LoomError(f"{self.name} cannot be opened: {type_name(error)}"))
        finally:
            if not ready.done():
                ready.set_exception(LoomError(f"{self.name} was closed while it opened"))
            ready.exception()  # asyncio reports one that nothing has read
            self._leaving.discard(asyncio.current_task())
