"""A continuous pull: a consumer kept topped up with requests, healed when the server goes quiet."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from nats.aio.subscription import Subscription

from loom.bus.logs.logger import get_logger
from loom.bus.natsio.jetstream import JetStream
from loom.bus.natsio.transport.message import Msg
from loom.schemas.errors import BusUnavailable, LoomError

log = get_logger()

EXPIRES_S = 30.0
HEARTBEAT_S = 2.0  # three missed ones: a replica that led the consumer died without a word
QUIET_S = 2.5 * HEARTBEAT_S
RETRY_S = 0.25
STALLED_AFTER = 3
"""Unanswered tries in a row to restore a consumer, after which another server is tried."""
RETRY_MOST_S = 4.0
"""Longest wait before trying again to reach a consumer that stays away; each wait is twice the last."""


class PullConsumer:
    """Messages of one consumer, handed to `sink` as they come, never more than `window()` asked for.

    Args:
        window: How many further messages there is room for right now, those on their way not counted.
        sink: Takes a message; must not block.
        broken: Called when the consumer is gone or cannot be reached, before pulling again.
    """

    def __init__(
        self,
        jetstream: JetStream,
        stream: str,
        consumer: str,
        *,
        window: Callable[[], int],
        sink: Callable[[Msg], None],
        broken: Callable[[], Any] | None = None,
    ) -> None:
        self._jetstream = jetstream
        self._api = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._consumer = consumer
        self._window = window
        self._sink = sink
        self._broken = broken
        self._asked = 0
        self._heard = 0.0
        self._subscription: Subscription | None = None
        self._inbox = ""
        self._stale = True
        self._asking: asyncio.Task[Any] | None = None
        self._watching: asyncio.Task[Any] | None = None
        self._healing: asyncio.Task[Any] | None = None
        self._retry_s = RETRY_S
        self._failures = 0
        """Times in a row that the server did not answer."""
        self._stopped = False
        self._unsent = asyncio.Event()

    @property
    def asked(self) -> int:
        """Messages asked for and not yet here."""
        return self._asked

    async def start(self) -> None:
        """Begin to pull."""
        await self._renew()
        self._jetstream.connection.on_reconnect(self._restart)
        self._asking = self._jetstream.connection.tasks.spawn(
            self._ask(), name=f"pull {self._consumer}", essential=True
        )
        self._watching = self._jetstream.connection.tasks.spawn(
            self._watch(), name=f"pull-watch {self._consumer}", essential=True
        )
        self.top_up()

    async def stop(self) -> None:
        """Ask for nothing more; what is on its way still reaches the sink before this returns."""
        self._stopped = True
        self._unsent.set()
        self._jetstream.connection.forget_reconnect(self._restart)
        if self._watching is not None:
            self._watching.cancel()
        try:
            if self._asking is not None:
                await asyncio.wait([self._asking])
        finally:  # a caller that is cancelled meanwhile leaves no subscription
            subscription, self._subscription = self._subscription, None
            if subscription is not None:
                await self._jetstream.requests.drain(subscription)

    async def _renew(self) -> None:
        """Listen on a fresh inbox: what the server still owes the old one must not come on top of what is asked now."""
        old, self._subscription = self._subscription, None
        if old is not None:
            await self._jetstream.requests.drain(old)
        if self._stopped:
            return
        self._inbox = self._jetstream.requests.new_inbox()
        self._subscription = await self._jetstream.connection.subscribe_sync(self._inbox, self._on_message)
        self._stale, self._asked = False, 0

    def top_up(self) -> None:
        """Ask for as many messages as there is room for; cheap to call often."""
        if not self._stopped and (self._stale or self._worth(self._window() - self._asked)):
            self._unsent.set()

    def _worth(self, room: int) -> bool:
        """Whether to ask for so many more: few at a time would cost a request each."""
        return room > self._asked // 2

    async def _ask(self) -> None:
        while not self._stopped:
            await self._unsent.wait()
            self._unsent.clear()
            try:
                if self._stale:
                    await self._renew()
                await self._request(self._window() - self._asked)
            except LoomError as error:
                log.warning("pull_failed", consumer=self._consumer, error=error.message)
                self._asked = 0

    async def _request(self, room: int) -> None:
        if self._stopped or not self._worth(room):
            return
        self._asked += room
        if self._asked == room:
            self._heard = time.monotonic()
        body = {"batch": room, "expires": int(EXPIRES_S * 1e9), "idle_heartbeat": int(HEARTBEAT_S * 1e9)}
        await self._jetstream.connection.publish(self._api, body, reply=self._inbox)

    def _on_message(self, msg: Msg) -> None:
        self._heard = time.monotonic()
        status = None if msg.reply.startswith("$JS.ACK") else msg.status
        if status in (None, "100"):
            self._retry_s = RETRY_S
        if status is None:
            self._asked = max(0, self._asked - 1)
            self._sink(msg)
        elif status != "100" and not self._stale:
            self._on_status(status, msg)

    def _on_status(self, status: str, msg: Msg) -> None:
        headers = msg.headers
        if status in ("408", "404") or "Nats-Pending-Messages" in headers:
            self._retry_s = RETRY_S
            left = int(headers.get("Nats-Pending-Messages", self._asked))
            self._asked = max(0, self._asked - left)
            self.top_up()
            return
        log.info("pull_interrupted", consumer=self._consumer, status=status, reason=headers.get("Description", ""))
        self._heal()

    async def _watch(self) -> None:
        while not self._stopped:
            await asyncio.sleep(1)
            if self._asked and time.monotonic() - self._heard > QUIET_S:
                log.info("pull_quiet", consumer=self._consumer)
                self._heal()
            else:
                self.top_up()

    def _restart(self) -> None:
        """Forget what was asked: a reconnected server does not know of it."""
        self._stale, self._asked = True, 0
        self.top_up()

    def _heal(self) -> None:
        if self._healing is None or self._healing.done():
            self._healing = self._jetstream.connection.tasks.spawn(
                self._healed(), name=f"pull-heal {self._consumer}", essential=True
            )

    async def _healed(self) -> None:
        wait_s, self._retry_s = self._retry_s, min(2 * self._retry_s, RETRY_MOST_S)
        await asyncio.sleep(wait_s)
        if self._broken is not None:
            try:
                await self._broken()
            except LoomError as error:
                log.warning("consumer_not_restored", consumer=self._consumer, error=error.message)
                self._heard = time.monotonic()
                await self._count_failure(error)
            else:
                self._failures = 0
        self._restart()

    async def _count_failure(self, error: LoomError) -> None:
        """Leave the server once it has not answered a few times in a row: it may be cut off from the others."""
        if not isinstance(error, BusUnavailable):
            return  # it has answered
        self._failures += 1
        if self._failures >= STALLED_AFTER:
            self._failures = 0
            await self._jetstream.requests.leave_stalled_server()
