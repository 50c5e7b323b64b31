"""A continuous pull consumer: it keeps requests pending, and recovers when the server stops answering."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nats.aio.subscription import Subscription

from loom.bus.logs.logger import get_logger
from loom.bus.natsio.jetstream import JetStream
from loom.bus.natsio.transport.message import Msg
from loom.schemas.errors import BusUnavailable, LoomError

log = get_logger()

STALLED_AFTER = 3
"""Unanswered tries in a row to restore a consumer, after which another server is tried."""


@dataclass(frozen=True)
class PullTimings:
    """Intervals of a pull consumer, in seconds."""

    expires_s: float = 30.0
    """Time after which the server ends a request."""
    heartbeat_s: float = 2.0
    """Interval between two heartbeats of the server while a request is pending."""
    quiet_s: float = 5.0
    """Time without a message or heartbeat after which the consumer is restored: its leader may have died."""
    min_retry_s: float = 0.25
    """Pause before the first try to restore the consumer; each further pause is twice the last."""
    max_retry_s: float = 4.0
    """Longest pause before another try."""


class PullConsumer:
    """Pulls the messages of one consumer, and never requests more than `window()` of them.

    Args:
        stream: Name of the stream on the server.
        consumer: Name of the consumer.
        window: Returns how many messages the caller can take now; those already requested count against it.
        sink: Called with each message; must not block.
        restore: Awaited before the next request when the consumer is deleted or unreachable.
        timings: Intervals.
    """

    def __init__(
        self,
        jetstream: JetStream,
        stream: str,
        consumer: str,
        *,
        window: Callable[[], int],
        sink: Callable[[Msg], None],
        restore: Callable[[], Any] | None = None,
        timings: PullTimings = PullTimings(),
    ) -> None:
        self._jetstream = jetstream
        self._timings = timings
        self._api = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._consumer = consumer
        self._window = window
        self._sink = sink
        self._restore_consumer = restore
        self._request_times = {
            "expires": int(timings.expires_s * 1e9),
            "idle_heartbeat": int(timings.heartbeat_s * 1e9),
        }
        self._pending = 0
        self._received_at = 0.0
        """Monotonic time of the last message or heartbeat."""
        self._subscription: Subscription | None = None
        self._inbox = ""
        self._is_stale = True
        """Whether the server does not know of the pending requests, so that a new inbox is needed."""
        self._pulling: asyncio.Task[Any] | None = None
        self._watching: asyncio.Task[Any] | None = None
        self._restoring: asyncio.Task[Any] | None = None
        self._min_retry_s = self._retry_s = timings.min_retry_s
        self._failures = 0
        """Tries in a row to restore the consumer that the server did not answer."""
        self._stopped = False
        self._due = asyncio.Event()
        """Set when a request may be due."""

    @property
    def pending(self) -> int:
        """Messages that are requested and have not arrived yet."""
        return self._pending

    async def start(self) -> None:
        """Start pulling."""
        await self._subscribe()
        self._jetstream.connection.on_reconnect(self._restart)
        self._pulling = self._jetstream.connection.tasks.spawn(
            self._pull(), name=f"pull {self._consumer}", essential=True
        )
        self._watching = self._jetstream.connection.tasks.spawn(
            self._watch(), name=f"pull-watch {self._consumer}", essential=True
        )
        self.top_up()

    async def stop(self) -> None:
        """Stop pulling; messages that are on their way still reach the sink before this method returns."""
        self._stopped = True
        self._due.set()
        self._jetstream.connection.forget_reconnect(self._restart)
        if self._watching is not None:
            self._watching.cancel()
        try:
            if self._pulling is not None:
                await asyncio.wait([self._pulling])
        finally:  # a cancelled caller leaves no subscription behind
            subscription, self._subscription = self._subscription, None
            if subscription is not None:
                await self._jetstream.requests.drain(subscription)

    async def _subscribe(self) -> None:
        """Subscribe to a new inbox, so that messages still pending for the old one do not exceed the current window."""
        old, self._subscription = self._subscription, None
        if old is not None:
            await self._jetstream.requests.drain(old)
        if self._stopped:
            return
        self._inbox = self._jetstream.requests.new_inbox()
        self._subscription = await self._jetstream.connection.subscribe_sync(self._inbox, self._on_message)
        self._is_stale, self._pending = False, 0

    def top_up(self) -> None:
        """Request as many messages as the window allows; cheap to call often."""
        if not self._stopped and (self._is_stale or self._is_enough(self._window() - self._pending)):
            self._due.set()

    def _is_enough(self, count: int) -> bool:
        """Return whether a request for `count` more messages is worth its cost."""
        return count > self._pending // 2

    async def _pull(self) -> None:
        while not self._stopped:
            await self._due.wait()
            self._due.clear()
            try:
                if self._is_stale:
                    await self._subscribe()
                await self._request(self._window() - self._pending)
            except LoomError as error:
                log.warning("pull_failed", consumer=self._consumer, error=error.message)
                self._pending = 0

    async def _request(self, count: int) -> None:
        if self._stopped or not self._is_enough(count):
            return
        self._pending += count
        if self._pending == count:
            self._received_at = time.monotonic()
        body = {"batch": count, **self._request_times}
        await self._jetstream.connection.publish(self._api, body, reply=self._inbox)

    def _on_message(self, msg: Msg) -> None:
        self._received_at = time.monotonic()
        status = None if msg.reply.startswith("$JS.ACK") else msg.status
        if status in (None, "100"):
            self._retry_s = self._min_retry_s
        if status is None:
            self._pending = max(0, self._pending - 1)
            self._sink(msg)
        elif status != "100" and not self._is_stale:
            self._on_status(status, msg)

    def _on_status(self, status: str, msg: Msg) -> None:
        headers = msg.headers
        if status in ("408", "404") or "Nats-Pending-Messages" in headers:
            self._retry_s = self._min_retry_s
            unsent = int(headers.get("Nats-Pending-Messages", self._pending))
            self._pending = max(0, self._pending - unsent)
            self.top_up()
            return
        log.info("pull_interrupted", consumer=self._consumer, status=status, reason=headers.get("Description", ""))
        self._begin_restore()

    async def _watch(self) -> None:
        while not self._stopped:
            await asyncio.sleep(1)
            if self._pending and time.monotonic() - self._received_at > self._timings.quiet_s:
                log.info("pull_heartbeat_missed", consumer=self._consumer)
                self._begin_restore()
            else:
                self.top_up()

    def _restart(self) -> None:
        """Forget the pending requests, which a reconnected server does not know, and request again."""
        self._is_stale, self._pending = True, 0
        self.top_up()

    def _begin_restore(self) -> None:
        if self._restoring is None or self._restoring.done():
            self._restoring = self._jetstream.connection.tasks.spawn(
                self._restore(), name=f"pull-restore {self._consumer}", essential=True
            )

    async def _restore(self) -> None:
        wait_s, self._retry_s = self._retry_s, min(2 * self._retry_s, self._timings.max_retry_s)
        await asyncio.sleep(wait_s)
        if self._restore_consumer is not None:
            try:
                await self._restore_consumer()
            except LoomError as error:
                log.warning("consumer_not_restored", consumer=self._consumer, error=error.message)
                self._received_at = time.monotonic()
                await self._count_failure(error)
            else:
                self._failures = 0
        self._restart()

    async def _count_failure(self, error: LoomError) -> None:
        """Leave the server after a few unanswered tries in a row: it may be cut off from the other servers."""
        if not isinstance(error, BusUnavailable):
            return  # the server has answered
        self._failures += 1
        if self._failures >= STALLED_AFTER:
            self._failures = 0
            await self._jetstream.requests.leave_stalled_server()
