"""Requests and their replies, over one inbox subscription.

All replies arrive on one subscription and are distinguished by the last token of their subject. A request needs no
subscription of its own.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import nats.errors
from nats.aio.subscription import Subscription

from loom.bus.logs.logger import get_logger
from loom.bus.natsio.connection import Connection
from loom.bus.natsio.one_shot import OneShot
from loom.bus.natsio.transport.message import Msg
from loom.schemas.errors import LoomError

log = get_logger()

SETTLED_S = 4.0
"""Age in seconds before which a connection is not given up."""
DRAIN_S = 2.0
"""Seconds to wait for the handler of an ended subscription to process its messages."""


class NoResponders(LoomError):
    """A subject has no subscriber. This is only a shortcut: with a tap as subscriber the error does not occur."""

    code = "bus_unavailable"


class Requests:
    """Sends requests over a connection and waits for the replies."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._prefix = connection.inbox
        self._sinks: dict[str, Callable[[Msg], None]] = {}
        self._next_token = 0
        self._leaving = False

    async def start(self) -> None:
        """Subscribe to the replies; to be called once after each `connect`."""
        await self.connection.subscribe_sync(f"{self._prefix}.*", self._on_reply)

    # -- inboxes

    def new_inbox(self) -> str:
        """Return a new subject for a subscription of the caller's own, outside the shared reply inbox."""
        return f"{self._prefix}.own.{uuid4().hex[:8]}"

    @property
    def no_inbox(self) -> str:
        """A reply subject without a reader, for requests whose replies are not needed."""
        return f"{self._prefix}.0"

    def open_inbox(self, sink: Callable[[Msg], None]) -> str:
        """Return a reply subject; `sink` is called with its messages until `close_inbox`.

        Raises:
            WrongEventLoop: The connection is open in another event loop.
        """
        self.connection.check_loop()
        self._next_token += 1
        reply = f"{self._prefix}.{self._next_token}"
        self._sinks[reply] = sink
        return reply

    def close_inbox(self, reply: str) -> None:
        """Drop further messages to a reply subject."""
        self._sinks.pop(reply, None)

    def _on_reply(self, msg: Msg) -> None:
        sink = self._sinks.get(msg.subject)
        if sink is not None:  # else too late
            sink(msg)

    # -- requests

    async def request(
        self, subject: str, message: Any = b"", *, timeout_s: float = 2.0, again_s: float | None = None
    ) -> Msg:
        """Return the first reply.

        Args:
            again_s: Seconds without a reply after which the request is sent again; only for idempotent requests.

        Raises:
            TimeoutError: No reply arrived in time.
            NoResponders: The subject has no subscriber.
        """
        give_up = time.monotonic() + timeout_s
        reply: OneShot[Msg] = OneShot()
        inbox = self.open_inbox(reply.set)
        try:
            await self.connection.publish(subject, message, reply=inbox)
            if self.connection.is_unread:
                raise TimeoutError(f"no reply on {subject} can be received: the event loop is ending")
            while (msg := await reply.wait(min(give_up - time.monotonic(), again_s or timeout_s))) is None:
                if time.monotonic() >= give_up:
                    raise TimeoutError(f"no reply on {subject} within {timeout_s:g} s")
                if self.connection.is_connected:  # else the first one is still in the buffer
                    await self.connection.publish(subject, message, reply=inbox)
        finally:
            self.close_inbox(inbox)
        if msg.status == "503":
            raise NoResponders(f"{subject} has no subscriber")
        return msg

    async def flush(self, *, timeout_s: float = 2.0) -> None:
        """Return once the server has processed everything that was sent before.

        Raises:
            TimeoutError: The server has not done so within `timeout_s`.
        """
        reply: OneShot[Msg] = OneShot()
        inbox = self.open_inbox(reply.set)
        try:
            await self.connection.publish(inbox)
            if await reply.wait(timeout_s) is None:
                raise TimeoutError(f"the server did not answer a flush within {timeout_s:g} s")
        finally:
            self.close_inbox(inbox)

    async def leave_stalled_server(self) -> None:
        """Reconnect to another server; a single server is left only if it does not answer a flush.

        One of several servers may be cut off from the others: it answers, but stores nothing. While the connection is
        less than 4 s old, this method does nothing.
        """
        if self._leaving or self.connection.settled_s < SETTLED_S:
            return
        self._leaving = True
        try:
            if self.connection.server_count > 1 or not await self._is_server_responding():
                log.warning("connection_stalled")
                await self.connection.reconnect()
        finally:
            self._leaving = False

    async def _is_server_responding(self) -> bool:
        try:
            await self.flush(timeout_s=1)
        except (TimeoutError, LoomError):
            return False
        return True

    async def drain(self, subscription: Subscription) -> None:
        """End a subscription after its handler has processed all messages that the server has sent on it."""
        if self.connection.is_unread:  # a flush could not be answered
            self.connection.unsubscribe(subscription)
            return
        try:
            with contextlib.suppress(nats.errors.Error, LoomError, TimeoutError):
                await self.connection.stop_delivery(subscription)
                await self.flush()
                async with asyncio.timeout(DRAIN_S):
                    await subscription._pending_queue.join()  # messages that wait for the handler
        finally:
            self.connection.unsubscribe(subscription)
