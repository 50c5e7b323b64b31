"""Calls into functions that users wrote, which may block, exit or cancel themselves."""

import asyncio
import inspect
import sys
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

import msgspec

from loom.schemas.wire import encode, free_json_fault

MAX_FAULT_CHARS = 500

T = TypeVar("T")


async def call(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Return what `fn` returns, raising what it raises; a sync one runs in a thread of its own.

    A cancelled call returns at once; the thread of a sync function is abandoned to run to its end, unheard.
    """
    with guarded():
        if _is_async(fn):
            result = fn(*args, **kwargs)
        else:
            result = await _in_thread(partial(fn, *args, **kwargs))
        return await result if inspect.isawaitable(result) else result


@contextmanager
def guarded() -> Iterator[None]:
    """Keep what is meant to end a process or task from leaving a user's code as anything but a RuntimeError."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError("it called exit()") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RuntimeError("it was cancelled from within") from error


class Opened(Generic[T]):
    """Iterates over what a user's code yields, and closes it, if it can be, however that ends."""

    def __init__(self, source: AsyncIterable[T]) -> None:
        self._items = aiter(source)

    async def __aenter__(self) -> AsyncIterator[T]:
        return self._items

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close = getattr(self._items, "aclose", None)
        if close is not None:
            await close()


def text_of(value: Any) -> str:
    """Return a user's value as text: a str as it is, anything else as JSON.

    Raises:
        ValueError: JSON cannot carry it.
    """
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    try:
        plain = msgspec.to_builtins(value, str_keys=True)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"a {type(value).__name__} is neither text nor JSON") from None
    fault = free_json_fault(plain, max_bytes=sys.maxsize)
    if fault:
        raise ValueError(f"the value {fault}")
    return encode(plain).decode()


def describe(error: BaseException) -> str:
    """Return `TypeName: message` on one line, at most 500 characters: no repr, no traceback."""
    message = " ".join(str(error).split())
    name = type(error).__name__
    return (f"{name}: {message}" if message else name)[:MAX_FAULT_CHARS]


def _is_async(fn: Callable[..., Any]) -> bool:
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
