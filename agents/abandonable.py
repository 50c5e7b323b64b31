"""Abandons coroutines of user code, which may ignore their cancellation."""

import asyncio
import ctypes
from collections.abc import Coroutine, Generator
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Abandonable(Generic[T]):
    """Awaits a coroutine until it ends, or until it is abandoned and its task resumes once more.

    Raises:
        asyncio.CancelledError: The coroutine was abandoned.
    """

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work = work
        self._abandoned = False
        self.cancelled_itself = False
        """Whether the coroutine cancelled its own task."""

    def abandon(self) -> None:
        """Do not resume the coroutine again; the caller must cancel its task afterwards."""
        self._abandoned = True

    def __await__(self) -> Generator[Any, Any, T]:
        """Forward each awaited object to the event loop, and each result to the coroutine."""
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
            except BaseException as error:  # noqa: BLE001 - thrown into the coroutine
                step = partial(self._work.throw, error)
            if self._abandoned:
                # The reference is never released: destroying the coroutine would resume user code, which may not end.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._work))
                raise asyncio.CancelledError
