"""Starts and closes agents that hold resources such as connections."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any

from loom.agents.user_code import call, ends_task, error_fields, type_name
from loom.bus.logs.logger import get_logger
from loom.schemas.errors import AgentFailed, LoomError

START_S = 30.0
"""Seconds an agent's `start` may take."""
CLOSE_S = 5.0
"""Seconds an agent's `close` may take."""

log = get_logger()


class Lifetime:
    """Calls `start` and `close` of an agent in one task: a task group opened in `start` can be closed in `close`.

    Args:
        agent: An object with `async def start(self)`, `async def close(self)`, or both.
        context: Context variables in which both are called.
    """

    def __init__(self, agent: Any, context: Context) -> None:
        self._agent = agent
        self._name = type(agent).__name__
        self._closing = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = loop.create_future()
        self._work = loop.create_task(self._live(), name=f"lifetime of {self._name}", context=context.copy())

    @property
    def failed(self) -> bool:
        """Whether `start` has failed; the next run tries again with a new Lifetime."""
        return self._started.done() and self._started.exception() is not None

    async def started(self) -> None:
        """Wait until `start` has returned.

        Raises:
            AgentFailed: `start` raised, or took longer than START_S.
        """
        if not self._started.done():
            await asyncio.wait([self._started], timeout=START_S)
        if not self._started.done():
            self._work.cancel()
            self._fail(f"it was not ready within {START_S:g} s")
        self._started.result()

    def close(self) -> None:
        """Schedule the call of `close`, from synchronous code."""
        self._closing.set()

    async def closed(self) -> None:
        """Call `close` and wait for it, for at most CLOSE_S."""
        self.close()
        if not self._started.done():  # no run waits for the start
            self._work.cancel()
        await asyncio.wait([self._work], timeout=CLOSE_S)
        if not self._work.done():
            self._work.cancel()
            log.warning("agent_not_closed", agent=self._name, reason=f"close took more than {CLOSE_S:g} s")

    async def _live(self) -> None:
        start, close = _method(self._agent, "start"), _method(self._agent, "close")
        try:
            if start is not None:
                await call(start)
        except LoomError as error:
            self._fail(error.message)
            return
        except BaseException as error:  # user code may raise anything; the run that needs the agent fails
            if ends_task(error):
                self._fail("it was stopped")
                raise
            log.warning("agent_start_failed", agent=self._name, **error_fields(error))
            self._fail(f"its start raised {type_name(error)}")
            return
        if not self._started.done():
            self._started.set_result(None)
        await self._closing.wait()
        try:
            if close is not None:
                await call(close)
        except BaseException as error:  # user code may raise anything; the host closes the other agents
            if ends_task(error):
                raise
            log.warning("agent_close_failed", agent=self._name, **error_fields(error))

    def _fail(self, reason: str) -> None:
        if not self._started.done():
            self._started.set_exception(AgentFailed(f"the agent did not start: {reason}"))
            self._started.exception()  # marked as retrieved, because there may be no run that waits for it


def has_lifetime(agent: Any) -> bool:
    """Return whether an agent has an async `start` or `close` without required arguments."""
    return _method(agent, "start") is not None or _method(agent, "close") is not None


def _method(agent: Any, name: str) -> Callable[[], Awaitable[None]] | None:
    method: Callable[[], Awaitable[None]] | None = getattr(agent, name, None)
    if method is None or isinstance(agent, type) or not inspect.iscoroutinefunction(method):
        return None
    try:
        inspect.signature(method).bind()
    except (TypeError, ValueError):
        return None
    return method
