"""The `lifespan` of a node file: opened before its nodes start, closed after them."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from loom.agents.user_code import contain, error_text
from loom.bus.logs.logger import get_logger
from loom.schemas.errors import LoomError

ENTER_S = 60.0
"""Seconds a lifespan may take to begin."""
LEAVE_S = 5.0
"""Seconds a lifespan may take to end."""
FORM = "lifespan must be an async generator function without arguments that yields once, or an async context manager"

Lifespan = Callable[[], AbstractAsyncContextManager[Any]]

log = get_logger()


class InvalidLifespan(LoomError):
    """A file's `lifespan` cannot be used, or has failed to begin."""

    code = "invalid_file"


def lifespan_of(given: Any) -> Lifespan:
    """Return the `lifespan` of a file as a function that returns an async context manager.

    Raises:
        InvalidLifespan: The object is something else.
    """
    if not callable(given) or inspect.iscoroutinefunction(given) or isinstance(given, type):
        raise InvalidLifespan(FORM)
    try:
        inspect.signature(given).bind()
    except (TypeError, ValueError):
        raise InvalidLifespan(FORM) from None
    return asynccontextmanager(given) if inspect.isasyncgenfunction(given) else given


@asynccontextmanager
async def entered(lifespan: Lifespan | None, path: Path) -> AsyncIterator[None]:
    """Enter a file's lifespan, run the body and leave it, also when the body is cancelled; without one, run the body.

    A failure to leave is logged.

    Raises:
        InvalidLifespan: It failed to begin; the message names the file.
    """
    if lifespan is None:
        yield
        return
    manager = await _begin(lifespan, path)
    try:
        yield
    finally:
        try:
            with contain():
                async with asyncio.timeout(LEAVE_S):
                    await manager.__aexit__(None, None, None)
        except Exception as error:  # noqa: BLE001 - user code may raise anything
            log.error("lifespan_failed", reason=f"{path}: lifespan did not end: {error_text(error)}")


async def _begin(lifespan: Lifespan, path: Path) -> Any:
    manager: Any = None
    try:
        with contain():
            manager = lifespan()
            async with asyncio.timeout(ENTER_S):
                await manager.__aenter__()
    except Exception as error:
        usable = manager is None or isinstance(manager, AbstractAsyncContextManager)
        fault = f"lifespan did not begin: {error_text(error)}" if usable else FORM
        raise InvalidLifespan(f"{path}: {fault}") from error
    return manager
