"""A coroutine that can be left behind: user code may ignore its cancellation."""

import asyncio
import ctypes
from collections.abc import Coroutine, Generator
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Abandonable(Generic[T]):
    """Awaits a coroutine until it ends, or until it is abandoned and its task is cancelled or woken once more.

    Raises:
        asyncio.CancelledError: It was abandoned.
    """

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work = work
        self._abandoned = False
        self.cancelled_itself = False
        """Whether the coroutine has cancelled the task that runs it."""

    def abandon(self) -> None:
        """Resume the coroutine no more; to be followed by a cancel of its task."""
        self._abandoned = True

    def __await__(self) -> Generator[Any, Any, T]:
        """Pass on what the coroutine awaits, and what comes back."""
        task = asyncio.current_task()
        step = partial(self._work.send, None)
        while True:
            cancels = task.cancelling() if task else 0
            try:
                awaited = step()
            except StopIteration as end:
                value: T = end.value
                return value
            self.cancelled_itself = self.cancelled_itself or (task is not None and task.cancelling() > cancels)
            try:
                step = partial(self._work.send, (yield awaited))
            except GeneratorExit:
                self._work.close()
                raise
            except BaseException as error:  # noqa: BLE001 - handed on: it is for the coroutine to handle
                step = partial(self._work.throw, error)
            if self._abandoned:
                # Never freed: its end would run the user's code once more, which may not end even then.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._work))
                raise asyncio.CancelledError
