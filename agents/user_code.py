"""Calls functions of users, which may block the thread, exit the process or cancel their own task."""

import asyncio
import inspect
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

from loom.bus.logs import log_fields
from loom.bus.logs.logger import get_logger

TURN_S = 0.01
"""Seconds after which an iteration that never waits yields to the event loop."""
AWAITABLES = 2
"""A coroutine and its result are awaited; the limit stops at an awaitable that returns itself."""

T = TypeVar("T")

log = get_logger()


class BaseExceptionRaised(Exception):
    """User code raised an exception that would end the process or the task; it is the `__cause__`."""


class UserFunction:
    """A function of a user that may be called many times; whether it is async is determined once."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        self._is_async = is_async(fn)

    async def call(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the function and return its result; a sync function runs in its own thread.

        A cancelled call returns at once, while the thread of a sync function continues to its end.

        Raises:
            BaseExceptionRaised: The function raised an exception that is not an Exception.
            Exception: The function raised it.
        """
        with contain():
            if self._is_async:
                result = self._fn(*args, **kwargs)
            else:
                result = await _in_thread(partial(self._fn, *args, **kwargs))
            for _ in range(AWAITABLES):
                if type(result) is not str and inspect.isawaitable(result):
                    result = await result
            return result


async def call(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call `fn` once as a `UserFunction`, and return its result."""
    with contain():
        function = UserFunction(fn)
    return await function.call(*args, **kwargs)


class contain:  # noqa: N801 - used as a function; a class takes a third of the time of a contextmanager
    """Convert SystemExit, stray CancelledError and the like, raised by user code, into `BaseExceptionRaised`.

    A cancellation of the current task passes. The body must not contain `yield`, because the GeneratorExit of a
    generator that is closed there is not raised by user code.
    """

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if error is None or isinstance(error, Exception) or ends_task(error):
            return False
        raise BaseExceptionRaised("a BaseException") from error


def ends_task(error: BaseException) -> bool:
    """Return whether `error` cancels the current task or closes its coroutine, and was not raised by user code."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is None or task.cancelling() > 0
    trace = error.__traceback__
    return isinstance(error, GeneratorExit) and (trace is None or trace.tb_next is None)


class ClosingIterator(Generic[T]):
    """Iterates over an async iterable of user code, contains its exceptions, and closes it at the end.

    An iteration that never waits yields to the event loop every TURN_S.
    """

    def __init__(self, source: AsyncIterable[T]) -> None:
        with contain():
            self._items = aiter(source)
        self._turn_at = time.monotonic()

    async def __aenter__(self) -> Self:
        return self

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        if time.monotonic() - self._turn_at > TURN_S:
            await asyncio.sleep(0)
            self._turn_at = time.monotonic()
        try:  # without `contain`, as there may be 100,000 items per second
            return await self._items.__anext__()
        except Exception:
            raise
        except BaseException as error:
            if ends_task(error):
                raise
            raise BaseExceptionRaised("a BaseException") from error

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with contain():
                close = getattr(self._items, "aclose", None)
                if close is not None:
                    await close()
        except Exception as fault:
            if error is None:
                raise
            # The error that ended the iteration is the one to raise.
            log.warning("close_failed", **error_fields(fault))


def origin(error: BaseException) -> BaseException:
    """Return the exception that user code raised: some cannot leave a coroutine and are wrapped in another one."""
    cause = error.__cause__
    stopped = type(error) is RuntimeError and isinstance(cause, (StopIteration, StopAsyncIteration))
    return cause if cause is not None and (stopped or type(error) is BaseExceptionRaised) else error


def error_text(error: BaseException) -> str:
    """Return `TypeName: message` on one line without secrets, at most 500 characters."""
    return log_fields.summary(origin(error))


def error_fields(error: BaseException) -> dict[str, str]:
    """Return log fields of a user exception: type, message without secrets, and place."""
    return log_fields.error_fields(origin(error))


def type_name(error: BaseException) -> str:
    """Return the class name of a user exception, the only part of it that is published."""
    return log_fields.type_name(origin(error))


def is_async(fn: Callable[..., Any]) -> bool:
    """Return whether `fn` is a coroutine function or an async generator function, so that its call cannot block."""
    return any(
        check(candidate)
        for check in (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        for candidate in (fn, getattr(fn, "__call__", None))  # noqa: B004 - an object may have an async __call__
    )


async def _in_thread(fn: Callable[[], Any]) -> Any:
    # asyncio.to_thread has few threads: functions that hang would occupy all of them and delay the end of the process.
    # The callers limit concurrency: a host by its slots, an agent by its parallel tools.
    loop = asyncio.get_running_loop()
    finished: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
    context = copy_context()

    def work() -> None:
        try:
            outcome: tuple[Any, BaseException | None] = (context.run(fn), None)
        except BaseException as error:  # noqa: BLE001 - raised again by the awaiting task
            outcome = (None, error)
        with suppress(RuntimeError):  # the loop has closed, so no task waits for the result
            loop.call_soon_threadsafe(settle, outcome)

    def settle(outcome: tuple[Any, BaseException | None]) -> None:
        if not finished.done():
            finished.set_result(outcome)

    threading.Thread(target=work, name="loom-user-code", daemon=True).start()
    value, error = await finished
    if error is not None:
        raise error
    return value
