"""Publishing into streams: each message is sent again until the server acknowledges it."""

import asyncio
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import msgspec

from loom.bus.logs.discards import Discards
from loom.bus.natsio.connection import Connection
from loom.bus.natsio.requests import Requests
from loom.bus.natsio.server_errors import NO_LEADER, ApiError, ServerErrorCode
from loom.bus.natsio.transport.message import Msg
from loom.schemas.base import Count, Message, Name, Undecodable, decode
from loom.schemas.errors import BusUnavailable, LoomError, Overloaded

if TYPE_CHECKING:
    from loom.bus.natsio.jetstream import JetStream

TRY_S = 2.0
"""Seconds to wait for an acknowledgement before the message is sent again; the message id makes that safe."""
CHECK_S = 0.05
"""Seconds between two checks for missing acknowledgements."""
UNDECIDED_S = 0.1
"""Seconds before a message is sent again whose storage is undecided."""
STALLED_AFTER = 2
"""Sends in a row without an acknowledgement after which the server may be stalled; a single one may be chance."""


class PubAck(Message, frozen=True, kw_only=True):
    """The server's acknowledgement that a message is stored."""

    stream: Name = ""
    seq: Count = 0
    duplicate: bool = False
    """Whether a message of this id was stored before, so that this one is not. A repetition by `JetStream.publish`
    itself does not count."""


class PubReply(PubAck, frozen=True, kw_only=True):
    """The server's reply to a publish: an acknowledgement, or an error."""

    error: ApiError | None = None


class PubAckFuture:
    """A published message. Awaited, it returns the PubAck; one task at a time may await it.

    If the awaiting task is cancelled, the message is sent nevertheless.

    Raises:
        Conflict: The expected last sequence in the headers is not the last one.
        Overloaded: The stream is full; or it has a leader and stores nothing within `within_s`, as with a full disk.
        Refused: The server refused the message for another reason.
        BusUnavailable: No acknowledgement arrived within `within_s`, or the connection was closed.
    """

    __slots__ = (
        "_ack",
        "_connection",
        "_error",
        "_waiting",
        "give_up",
        "headers",
        "is_repeated",
        "payload",
        "reply",
        "retrying",
        "subject",
        "until",
        "within_s",
    )

    def __init__(
        self, connection: Connection, subject: str, payload: bytes, headers: dict[str, str], within_s: float
    ) -> None:
        self._connection = connection
        self.subject, self.payload, self.headers = subject, payload, headers
        self.within_s = within_s
        self.give_up = time.monotonic() + within_s
        self.until = min(time.monotonic() + TRY_S, self.give_up)
        """Monotonic time until which the last send may be acknowledged."""
        self.reply = ""
        self.is_repeated = False
        self.retrying = False
        """Whether a task is about to send the message again."""
        self._ack: PubAck | None = None
        self._error: LoomError | None = None
        self._waiting: asyncio.Future[None] | None = None

    @property
    def done(self) -> bool:
        """Whether the message is acknowledged or has failed."""
        return self._ack is not None or self._error is not None

    def set_ack(self, ack: PubAck) -> None:
        """Resolve the future: the message is stored."""
        is_own = self.is_repeated and ack.duplicate
        self._ack = msgspec.structs.replace(ack, duplicate=False) if is_own else ack
        self._wake()

    def set_error(self, error: LoomError) -> None:
        """Fail the future: the message is not stored, or the outcome is unknown."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def __await__(self) -> Generator[Any, None, PubAck]:
        return self.ack().__await__()

    async def ack(self) -> PubAck:
        """Wait for the acknowledgement and return it, as `await` does."""
        await self._connection.wait_until_writable()
        if not self.done:
            if self._connection.is_unread:
                raise BusUnavailable(
                    "the event loop is ending before the server has acknowledged the message",
                    url=self._connection.address,
                )
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        if self._error is not None:
            raise self._error
        assert self._ack is not None  # noqa: S101 - set before the waiter is woken
        return self._ack


def read_reply(msg: Msg) -> PubReply | None:
    """Return the server's reply to a publish; None if the stream has no leader, or does not exist.

    Raises:
        Undecodable: The message is not such a reply.
    """
    return None if msg.status == "503" else decode(msg.data, PubReply)


class Publisher:
    """Publishes into streams, and sends messages again that are not acknowledged."""

    def __init__(self, connection: Connection, requests: Requests, discards: Discards, jetstream: "JetStream") -> None:
        self._connection = connection
        self._requests = requests
        self._discards = discards
        self._jetstream = jetstream
        self._pending: set[PubAckFuture] = set()
        self._failures = 0
        """Sends in a row without an acknowledgement."""

    def publish(self, subject: str, payload: bytes, headers: dict[str, str], within_s: float) -> PubAckFuture:
        """Send a message and return its future, as `JetStream.publish` describes."""
        future = PubAckFuture(self._connection, subject, payload, headers, within_s)
        self._open_inbox(future)
        try:
            self._connection.publish_nowait(subject, payload, reply=future.reply, headers=headers)
        except LoomError:
            self._requests.close_inbox(future.reply)
            raise
        self._pending.add(future)
        return future

    def close(self) -> None:
        """Fail all messages that are not acknowledged."""
        for future in list(self._pending):
            self._end(future)
            future.set_error(
                BusUnavailable(
                    "the connection was closed before the server had acknowledged the message",
                    url=self._connection.address,
                )
            )

    async def watch(self) -> None:
        """Send messages again that are not acknowledged in time; runs until cancelled.

        One check of all messages costs less than a timer for each.
        """
        while True:
            await asyncio.sleep(CHECK_S)
            now = time.monotonic()
            for future in [pending for pending in self._pending if now >= pending.until and not pending.retrying]:
                self._jetstream.missing.set()
                self._retry(future, after_s=0.0, silent=True)

    def publish_again(self) -> None:
        """Send all messages again that were not acknowledged when the connection was lost."""
        for future in list(self._pending):
            if not future.retrying:
                self._retry(future, after_s=0.0, silent=False)

    # -- one message

    def _open_inbox(self, future: PubAckFuture) -> None:
        future.reply = self._requests.open_inbox(lambda msg: self._on_reply(future, msg))

    def _end(self, future: PubAckFuture) -> None:
        self._requests.close_inbox(future.reply)
        self._pending.discard(future)

    def _on_reply(self, future: PubAckFuture, msg: Msg) -> None:
        try:
            reply = read_reply(msg)
        except Undecodable as error:  # not from the server: any client may publish to a reply subject
            self._discards.add("ack_undecodable", reason=error.message)
            reply = None
        if reply is None and msg.status == "503":  # the stream has no leader, or does not exist
            self._jetstream.missing.set()
        self._failures = 0
        if reply is None or (reply.error is not None and _is_undecided(reply.error)):
            if not future.retrying:
                self._retry(future, after_s=UNDECIDED_S, silent=False)
            return
        self._end(future)
        if reply.error is None:
            future.set_ack(reply)
        else:
            future.set_error(reply.error.to_exception())

    def _retry(self, future: PubAckFuture, *, after_s: float, silent: bool) -> None:
        future.retrying = True
        self._connection.tasks.spawn(self._publish_again(future, after_s, silent), name="publish again")

    async def _publish_again(self, future: PubAckFuture, after_s: float, silent: bool) -> None:
        """Send a message once more, unless its time is over.

        Each send has an inbox of its own, so that a late reply to an earlier one is not mistaken for the reply to it.
        """
        try:
            if after_s:
                await asyncio.sleep(after_s)
            if silent:
                await self._count_failure()
            if future.done:
                return
            if time.monotonic() >= future.give_up:
                error = await self._why_late(future, silent=silent)
                if not future.done:
                    self._end(future)
                    future.set_error(error)
                return
            self._requests.close_inbox(future.reply)
            self._open_inbox(future)
            future.is_repeated = True
            future.until = min(time.monotonic() + TRY_S, future.give_up)
            await self._connection.publish(future.subject, future.payload, reply=future.reply, headers=future.headers)
        except LoomError as error:  # the connection is closed, or its buffer is full
            if not future.done:
                self._end(future)
                future.set_error(error)
        finally:
            future.retrying = False

    async def _why_late(self, future: PubAckFuture, *, silent: bool) -> LoomError:
        late = f"the server has not acknowledged a message within {future.within_s} s"
        if silent and await self._is_led(future.subject):
            return Overloaded(f"{late}, although its stream has a leader: the disk may be full")
        return BusUnavailable(late)

    async def _is_led(self, subject: str) -> bool:
        """Return whether the stream of `subject` has a leader that answers; then the connection is not the cause."""
        try:
            reply = await self._jetstream.api("STREAM.NAMES", {"subject": subject}, timeout_s=1)
            streams = reply["streams"] or []
            for stream in streams:
                await self._jetstream.api(f"STREAM.INFO.{stream}", timeout_s=1)
        except (LoomError, KeyError):
            return False
        return bool(streams)

    async def _count_failure(self) -> None:
        self._failures += 1
        if self._failures >= STALLED_AFTER and self._connection.is_connected:
            self._failures = 0
            await self._requests.leave_stalled_server()


def _is_undecided(error: ApiError) -> bool:
    """Return whether the server has not decided yet if the message will be stored."""
    return error.err_code == ServerErrorCode.MSG_ID_IN_PROCESS or error.err_code in NO_LEADER
