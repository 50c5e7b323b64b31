"""Calls into functions that users wrote, which may block, exit or cancel themselves."""

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
"""Longest time an iteration that never waits keeps the event loop."""
AWAITABLES = 2
"""A coroutine, and what it returns, are awaited; an awaitable that returns itself is awaited no further."""

T = TypeVar("T")

log = get_logger()


class BaseExceptionRaised(Exception):
    """User code raised what ends a process or a task; `__cause__` is it."""


async def call(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Return what `fn` returns, raising what it raises as `contain` does; a sync one runs in a thread of its own.

    A cancelled call returns at once; the thread of a sync function is abandoned to run to its end.
    """
    with contain():
        if is_async(fn):
            result = fn(*args, **kwargs)
        else:
            result = await _in_thread(partial(fn, *args, **kwargs))
        for _ in range(AWAITABLES):
            if inspect.isawaitable(result):
                result = await result
        return result


class contain:  # noqa: N801 - used as a function; a class costs a third of a generator's context
    """Raise `BaseExceptionRaised` for whatever leaves the body and would end the process or this task.

    A cancellation of this very task passes. The body must hold no `yield`: a generator that is closed there ends by
    a GeneratorExit that is not the user's.
    """

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if error is None or isinstance(error, Exception) or ends_task(error):
            return False
        raise BaseExceptionRaised("a BaseException") from error


def ends_task(error: BaseException) -> bool:
    """Return whether `error` cancels the running task or closes the caller's coroutine, and is not user code's own."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is None or task.cancelling() > 0
    trace = error.__traceback__
    return isinstance(error, GeneratorExit) and (trace is None or trace.tb_next is None)


class ClosingIterator(Generic[T]):
    """Iterates over what a user's code yields, contain, and closes it, if it can be, however that ends.

    An iteration that never waits gives the event loop a turn now and then.
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
        try:  # `contain` by hand: there may be a hundred thousand items a second
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
            # What ended the iteration is the failure; this one came on top.
            log.warning("close_failed", **error_fields(fault))


def origin(error: BaseException) -> BaseException:
    """Return what user code raised: some exceptions cannot leave a coroutine, and come wrapped in another."""
    cause = error.__cause__
    stopped = type(error) is RuntimeError and isinstance(cause, (StopIteration, StopAsyncIteration))
    return cause if cause is not None and (stopped or type(error) is BaseExceptionRaised) else error


def error_text(error: BaseException) -> str:
    """Return `TypeName: message` on one line without secrets, at most 500 characters."""
    return log_fields.summary(origin(error))


def error_fields(error: BaseException) -> dict[str, str]:
    """Return type, message without secrets, and place of what user code raised, for a log line."""
    return log_fields.error_fields(origin(error))


def type_name(error: BaseException) -> str:
    """Return the class name of what user code raised: what may be published of it."""
    return log_fields.type_name(origin(error))


def is_async(fn: Callable[..., Any]) -> bool:
    """Return whether calling `fn` cannot block: it makes a coroutine or an async generator."""
    return any(
        check(candidate)
        for check in (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        for candidate in (fn, getattr(fn, "__call__", None))  # noqa: B004 - an object may have an async __call__
    )


async def _in_thread(fn: Callable[[], Any]) -> Any:
    # Not asyncio.to_thread: its few threads are all taken once that many functions hang, and they hold up
    # the process's end. Concurrency is bounded by whoever calls: a host's slots, an agent's parallel tools.
    loop = asyncio.get_running_loop()
    finished: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
    context = copy_context()

    def work() -> None:
        try:
            outcome: tuple[Any, BaseException | None] = (context.run(fn), None)
        except BaseException as error:  # noqa: BLE001 - raised again where it is awaited
            outcome = (None, error)
        with suppress(RuntimeError):  # the loop has closed: nobody waits any more
            loop.call_soon_threadsafe(settle, outcome)

    def settle(outcome: tuple[Any, BaseException | None]) -> None:
        if not finished.done():
            finished.set_result(outcome)

    threading.Thread(target=work, name="loom-user-code", daemon=True).start()
    value, error = await finished
    if error is not None:
        raise error
    return value
