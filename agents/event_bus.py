"""Calls handlers with the events of agents, for programs that do not iterate over them."""

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from fnmatch import fnmatchcase
from typing import Any

from loom.agents.user_code import error_fields
from loom.bus.logs.logger import get_logger
from loom.schemas.errors import LoomError
from loom.schemas.events import AgentEvent, ErrorEvent

log = get_logger()

Handler = Callable[[Any], Any]
"""Called with an event; a returned coroutine is awaited concurrently with the run, in the order of the events."""


class EventBus:
    """Calls handlers with events by type; an Agent has one.

    A run waits for async handlers only at its end. Exceptions of handlers are logged.

        agent.on("tool_call_end", lambda event: print(event.name, event.duration_ms))

    Args:
        parent: An event bus that also gets every event.
    """

    def __init__(self, parent: "EventBus | None" = None) -> None:
        self._parent = parent
        self._subscriptions: list[_Subscription] = []

    def on(self, kind: str, handler: Handler) -> None:
        """Call `handler` with each event of a type, such as `text_delta`."""
        self._subscriptions.append(_Subscription(kind, handler))

    def on_pattern(self, pattern: str, handler: Handler) -> None:
        """Call `handler` with each event whose type matches a pattern; `*` matches any text, and `:` means `_`."""
        self.on(pattern.replace(":", "_"), handler)

    def on_all(self, handler: Handler) -> None:
        """Call `handler` with each event."""
        self.on("*", handler)

    def off(self, kind: str, handler: Handler) -> None:
        """Remove a handler of a type or a pattern, if there is one."""
        kind = kind.replace(":", "_")
        self._subscriptions = [entry for entry in self._subscriptions if (entry.kind, entry.handler) != (kind, handler)]

    def create_child(self) -> "EventBus":
        """Return an event bus whose events are also passed to this one."""
        return EventBus(self)

    async def emit(self, event: AgentEvent) -> None:
        """Pass `event` to all handlers of its type, here and in the parents."""
        for subscription in tuple(self._subscriptions):
            if fnmatchcase(event.type, subscription.kind):
                subscription.call(event)
        if self._parent is not None:
            await self._parent.emit(event)

    async def relay(self, events: AsyncGenerator[AgentEvent, None]) -> AsyncGenerator[AgentEvent, None]:
        """Yield `events` and pass them to the handlers, which get an ErrorEvent if a LoomError ends them."""
        try:
            async with aclosing(events):
                async for event in events:
                    await self.emit(event)
                    yield event
        except LoomError as error:
            await self.emit(ErrorEvent(error=error.message, code=error.code))
            raise
        await self.settle()

    async def settle(self, timeout_s: float = 5.0) -> None:
        """Wait until async handlers have processed all events, here and in the parents, for at most `timeout_s`."""
        pending = [task for entry in self._subscriptions if (task := entry.last) is not None and not task.done()]
        if pending:
            await asyncio.wait(pending, timeout=timeout_s)
        if self._parent is not None:
            await self._parent.settle(timeout_s)


class _Subscription:
    """A handler and its latest call."""

    def __init__(self, kind: str, handler: Handler) -> None:
        self.kind = kind
        self.handler = handler
        self.last: asyncio.Task[None] | None = None

    def call(self, event: AgentEvent) -> None:
        try:
            result = self.handler(event)
        except Exception as error:  # noqa: BLE001 - a handler may raise anything; the run goes on
            log.warning("event_handler_raised", event_type=event.type, **error_fields(error))
            return
        if inspect.isawaitable(result):
            self.last = asyncio.ensure_future(self._after(self.last, result, event.type))

    async def _after(self, previous: asyncio.Task[None] | None, result: Awaitable[Any], event_type: str) -> None:
        if previous is not None:
            await asyncio.wait([previous])
        try:
            await result
        except Exception as error:  # noqa: BLE001 - a handler may raise anything; the run goes on
            log.warning("event_handler_raised", event_type=event_type, **error_fields(error))
