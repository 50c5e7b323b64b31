"""An ordered consumer: reads a stream in order, and continues through restarts of the server and lost messages."""

import asyncio
import contextlib
from typing import Any
from uuid import uuid4

from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.ack_metadata import ack_metadata
from loom.bus.natsio.jetstream import JetStream
from loom.bus.natsio.pull_consumer import PullConsumer
from loom.bus.natsio.stored_message import StoredMessage
from loom.bus.natsio.transport.message import Msg
from loom.schemas.errors import LoomError

log = get_logger()

WINDOW = 512
"""Messages that wait for the reader at most."""
IDLE_S = 60
"""Seconds without a request after which the server deletes the consumer."""


class OrderedConsumer:
    """Reads every message of a stream once, in stream order, without acknowledgements.

    The consumer on the server is ephemeral. When a message is missed or the consumer is deleted, another consumer is
    created that starts after the last message read. `stop` deletes it.

    Args:
        stream: Name of the stream on the server.
        filter: Filter of the subjects.
        deliver: `all`, `new`, or `last_per_subject`.
        start_seq: First sequence to read; overrides `deliver`.
        start_time: RFC 3339 time from which on to read; overrides `deliver`.
    """

    def __init__(
        self,
        jetstream: JetStream,
        stream: str,
        *,
        filter: str,  # noqa: A002 - the name in NATS clients
        deliver: str = "all",
        start_seq: int | None = None,
        start_time: str | None = None,
    ) -> None:
        self._jetstream = jetstream
        self._stream = stream
        self._filter = filter
        self._deliver = deliver
        self._start_seq = start_seq
        self._start_time = start_time
        self._buffer: list[StoredMessage] = []
        self._changed = asyncio.Event()
        self._pull: PullConsumer | None = None
        self._consumer = ""
        """Name of the consumer on the server; empty if there is none to delete."""
        self._last_seq = 0
        self._consumer_seq = 0
        self._restarting: asyncio.Task[None] | None = None
        self._started = False
        self._stopped = False
        self._at_end = False
        self._created = ""
        """Creation time of the stream, as in the server's reply."""
        self.generation = 0
        """How often the stream was deleted and another one of its name created; each is read from its first message."""
        self.caught_up = False
        """Whether the last batch ended with the last message that the stream contained at that time."""

    async def start(self) -> "OrderedConsumer":
        """Create the consumer and start pulling; otherwise done by the first `batch`."""
        if not self._started:
            await self._open()
            self._started = True
        return self

    async def begin(self) -> None:
        """Start as `start` does; retried until the server answers."""
        while True:
            try:
                await self.start()
            except LoomError as error:
                log.warning("ordered_consumer_not_started", stream=self._stream, error=error.message)
                await asyncio.sleep(1)
            else:
                return

    async def batch(self) -> list[StoredMessage]:
        """Wait for messages and return all that have arrived, oldest first; empty if there are none at the start."""
        await self.start()
        await self._changed.wait()
        self._changed.clear()
        batch, self._buffer = self._buffer, []
        self.caught_up = self._at_end
        if self._pull is not None:
            self._pull.top_up()
        return batch

    async def stop(self) -> None:
        """Stop reading, and delete the consumer on the server."""
        self._stopped = True
        try:
            if self._pull is not None:
                await self._pull.stop()
        finally:
            self._delete_consumer()

    def _delete_consumer(self) -> None:
        """Request the deletion without waiting for the reply: the server deletes unused consumers after IDLE_S, too."""
        name, self._consumer = self._consumer, ""
        if name:
            with contextlib.suppress(LoomError):
                self._jetstream.connection.publish_nowait(
                    f"$JS.API.CONSUMER.DELETE.{self._stream}.{name}", reply=self._jetstream.requests.no_inbox
                )

    async def _find_stream(self) -> None:
        """Start from the beginning if the stream is not the same one as before: its sequences start at 1 again."""
        created = str((await self._jetstream.api(f"STREAM.INFO.{self._stream}"))["created"])
        if self._created not in ("", created):
            log.warning("stream_replaced", stream=self._stream, last_seq=self._last_seq)
            self.generation += 1
            self._buffer.clear()
            self._last_seq, self._start_seq, self._start_time = 0, None, None
            self._deliver = "all" if self._deliver == "new" else self._deliver
        self._created = created

    async def _open(self) -> None:
        await self._find_stream()
        name = f"r_{uuid4().hex[:12]}"
        config: dict[str, Any] = {
            "name": name,
            "filter_subject": self._filter,
            "ack_policy": "none",
            "inactive_threshold": IDLE_S * 1_000_000_000,
            "mem_storage": True,
            "num_replicas": 1,
        }
        if self._last_seq:
            config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": self._last_seq + 1}
        elif self._start_seq is not None:
            config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": max(self._start_seq, 1)}
        elif self._start_time is not None:
            config |= {"deliver_policy": "by_start_time", "opt_start_time": self._start_time}
        else:
            config |= {"deliver_policy": self._deliver}
        self._consumer_seq = 0
        self._consumer = name  # before the request: a cancelled request may have been processed
        response = await self._jetstream.api(
            f"CONSUMER.CREATE.{self._stream}.{name}.{self._filter}",
            {"stream_name": self._stream, "config": config},
        )
        if config["deliver_policy"] == "new":  # a later consumer must not start after this one
            self._start_seq = response["delivered"]["stream_seq"] + 1
        self._at_end = not response.get("num_pending")
        if self._at_end:
            self._changed.set()  # `batch` returns an empty list
        self._pull = PullConsumer(
            self._jetstream,
            self._stream,
            name,
            window=lambda: WINDOW - len(self._buffer),
            sink=self._accept,
            restore=self._restart,
        )
        await self._pull.start()

    def _accept(self, msg: Msg) -> None:
        facts = ack_metadata(msg.reply)
        if facts.consumer_seq != self._consumer_seq + 1:
            if facts.consumer_seq > self._consumer_seq:  # a message was lost
                self._begin_restart()
            return
        self._consumer_seq = facts.consumer_seq
        self._last_seq = facts.stream_seq
        self._at_end = facts.pending == 0
        self._buffer.append(
            StoredMessage(msg.subject, msg.data, msg.headers, facts.stream_seq, facts.stored_at, facts.pending)
        )
        self._changed.set()

    def _begin_restart(self) -> asyncio.Task[None]:
        if self._restarting is None or self._restarting.done():
            self._restarting = self._jetstream.connection.tasks.spawn(
                self._reopen(), name=f"reopen {self._stream}", essential=True
            )
        return self._restarting

    async def _restart(self) -> None:
        await asyncio.wait([self._begin_restart()])

    async def _reopen(self) -> None:
        """Create another consumer that starts after the last message read; retried until the server answers."""
        old, self._pull = self._pull, None
        if old is not None:
            await old.stop()
        self._delete_consumer()
        while not self._stopped:
            try:
                await self._open()
            except (LoomError, LookupError, TypeError) as error:  # the latter two: a reply of an unexpected shape
                self._delete_consumer()
                log.warning("ordered_consumer_not_restored", stream=self._stream, **error_fields(error))
                await asyncio.sleep(1)
            else:
                break
        if self._stopped:
            await self.stop()
