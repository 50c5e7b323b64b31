"""The bus: requests, and messages that are stored, over one hardened connection.

Replies of every kind (answers, publish acknowledgements, offers) arrive on one inbox subscription and are
told apart by their last token, so that a request costs no subscription of its own.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar, overload
from uuid import uuid4

import msgspec
import nats.errors
from nats.aio.subscription import Subscription

from loom.bus.logs.logger import get_logger
from loom.bus.natsio.clock_sync import ClockSync
from loom.bus.natsio.connection import Connection, PayloadTooLarge
from loom.bus.natsio.one_shot import Awaited
from loom.bus.natsio.ownership import running_loop
from loom.bus.natsio.transport.message import Msg
from loom.schemas.base import Count, Name, Relayed, Text, Undecodable, decode, encode
from loom.schemas.errors import BusUnavailable, LoomError, Overloaded
from loom.schemas.identity import LOCAL, Identity

__all__ = ["Bus", "Conflict", "Msg", "NoResponders", "PayloadTooLarge", "PubAck", "Refused", "Subscription"]

log = get_logger()
T = TypeVar("T")

PUBLISH_TRY_S = 2.0  # one wait for a PubAck; the id makes a second try safe
HAND_OVER_S = 2.0
LOOK_S = 0.05
UNDECIDED_S = 0.1
LEADER_WAIT_S = 0.25
CLOCK_S = 1.0
"""How long the server may take to state its time."""
SETTLED_S = 4.0
"""Age from which a connection may be given up: a new one first gets time to work."""
ASK_AGAIN_S = 1.0
"""Silence after which a call that may be made twice is made again: its server may have died, or lost its lead."""

MAX_ANSWER_BYTES = 64 * 2**20
"""The server's own limit of a message; an answer of the API may be as long."""
STREAM_NOT_FOUND = 10059
CONSUMER_NOT_FOUND = 10014
_FULL = {10077, 10023, 10047}  # stream at its limit, insufficient resources, no room on disk
_WRONG_LAST = {10071, 10164}
_IN_PROCESS = 10158  # this id is being stored: an earlier sending of it, not yet on enough replicas
_NO_LEADER = {10008, 10009, 10118}  # replicas are choosing one; it takes seconds
_REPEATABLE = ("INFO", "STREAM.INFO.", "STREAM.MSG.GET.", "STREAM.CREATE.", "CONSUMER.INFO.", "CONSUMER.CREATE.")
_DISCOVERY_DENIED = 'permissions violation for publish to "$srv.'


class NoResponders(LoomError):
    """Nobody listens on a subject. A shortcut only: any tap makes it disappear."""

    code = "bus_unavailable"


class Refused(LoomError):
    """The server refused a JetStream call; `err_code` is its number."""

    code = "bus_unavailable"

    def __init__(self, message: str, err_code: int) -> None:
        super().__init__(message)
        self.err_code = err_code


class Conflict(Refused):
    """Someone else wrote this key first."""


class PubAck(Relayed, frozen=True, kw_only=True):
    """The server's word that a message is stored."""

    stream: Name = ""
    seq: Count = 0
    duplicate: bool = False
    """Whether another message had taken the id and this one is not stored; a repetition by `store` does not count."""


class _ApiError(Relayed, frozen=True, kw_only=True):
    code: Count = 0
    err_code: Count = 0
    description: Text = ""


class _Unconfirmed:
    """A message on its way into a stream."""

    def __init__(self, subject: str, payload: bytes, headers: dict[str, str]) -> None:
        self.subject, self.payload, self.headers = subject, payload, headers
        self.answer: Awaited[Msg] = Awaited()
        self.reply = ""
        self.until = math.inf
        """When to wait no longer, in monotonic time: one look at all of them is cheaper than a timer for each."""
        self.awaited = False
        """Whether the outcome is waited for; a task that is cancelled before its first step never waits."""
        self.anew = False
        """Whether the connection was lost meanwhile: silence then means nothing."""


class _Answer(Relayed, frozen=True, kw_only=True):
    error: _ApiError | None = None


class _PubReply(PubAck, frozen=True, kw_only=True):
    error: _ApiError | None = None


class Bus(Connection):
    """A connection that asks, and that stores: see Connection for its arguments."""

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "loom",
        role: str = "client",
        identity: Identity = LOCAL,
        patience_s: float = 2.0,
    ) -> None:
        super().__init__(url, namespace=namespace, role=role, identity=identity, patience_s=patience_s)
        self._sinks: dict[str, Callable[[Msg], None]] = {}
        self._next_token = 0
        self._failed_publishes = 0
        self._leaving = False
        self._unconfirmed: set[_Unconfirmed] = set()
        self.missing = asyncio.Event()
        """Set when a stream or a consumer may be missing on the server; `loom.bus.upkeep` creates it again."""
        self.on_reconnect(self._send_again)
        self._clock_sync = ClockSync(self)
        self.on_reconnect(self.missing.set)  # the server may have come back with an empty store

    async def connect(self) -> Self:
        """Connect, trying for `patience_s`.

        Raises:
            BusUnavailable: No server answered in that time, or it refused us.
        """
        await super().connect()
        await self._nc.listen(f"{self._inbox}.*", self._on_reply)
        self.spawn(self._watch_unconfirmed(), name="watch unconfirmed", essential=True)
        if not self.by_name:  # a submitter's permissions are for its own tasks alone
            await self.sync_clock()
            self.spawn(self._clock_sync.keep(), name="clock", essential=True)
        return self

    async def sync_clock(self) -> bool:
        """Measure the server's time for `now`; return whether the server gave it.

        The time stays this machine's own without JetStream, without the namespace's streams and without the right to
        ask for their information.
        """
        return await self._clock_sync.sync(timeout_s=CLOCK_S)

    async def _on_error(self, error: Exception) -> None:
        if self.role == "client" and _DISCOVERY_DENIED in str(error).lower():
            log.info("discovery_denied", hint="processes of another wire version go unnoticed here")
        elif not self._clock_sync.is_denial(error):
            await super()._on_error(error)

    async def close(self) -> None:
        """Close the connection; safe to call twice or before `connect`. What is not confirmed yet fails."""
        await super().close()
        self._wake_unconfirmed()

    def abort(self) -> None:
        """Drop the connection at once, from synchronous code; what is unsent is lost."""
        super().abort()
        with contextlib.suppress(RuntimeError):  # the loop has gone, and who waited with it
            self._wake_unconfirmed()

    def _wake_unconfirmed(self) -> None:
        for stored in self._unconfirmed:
            stored.answer.wake()

    # -- requests

    def new_inbox(self) -> str:
        """Return a fresh prefix for a subscription of one's own, outside the shared reply inbox."""
        return f"{self._inbox}.own.{uuid4().hex[:8]}"

    @property
    def no_inbox(self) -> str:
        """A reply subject for requests whose answer is of no use: answers to it are dropped."""
        return f"{self._inbox}.0"

    def open_inbox(self, sink: Callable[[Msg], None]) -> str:
        """Return a reply subject whose messages go to `sink` until `close_inbox`.

        Raises:
            WrongEventLoop: The connection is open in another event loop.
        """
        if running_loop() is not self._loop:
            self.check_owner()
        self._next_token += 1
        reply = f"{self._inbox}.{self._next_token}"
        self._sinks[reply] = sink
        return reply

    def close_inbox(self, reply: str) -> None:
        """Forget a reply subject."""
        self._sinks.pop(reply, None)

    async def request(
        self, subject: str, message: Any = b"", *, timeout_s: float = 2.0, again_s: float | None = None
    ) -> Msg:
        """Return the first answer.

        Args:
            again_s: Seconds of silence after which the same is asked again: only for what may come twice.

        Raises:
            TimeoutError: None came in time.
            NoResponders: Nobody listens.
        """
        give_up = time.monotonic() + timeout_s
        answer: Awaited[Msg] = Awaited()
        reply = self.open_inbox(answer.give)
        try:
            await self.publish(subject, message, reply=reply)
            if self._is_deaf():
                raise TimeoutError(f"no answer on {subject} can be read: the event loop ends")
            while (msg := await answer.wait(min(give_up - time.monotonic(), again_s or timeout_s))) is None:
                if time.monotonic() >= give_up:
                    raise TimeoutError(f"no answer on {subject} in {timeout_s:g} s")
                if self._nc.is_connected:  # else it waits in the buffer already
                    await self.publish(subject, message, reply=reply)
        finally:
            self.close_inbox(reply)
        if msg.status == "503":
            raise NoResponders(f"nobody listens on {subject}")
        return msg

    async def echo(self, *, timeout_s: float = 2.0) -> None:
        """Return once the server has processed all that was sent before."""
        answer: Awaited[Msg] = Awaited()
        reply = self.open_inbox(answer.give)
        try:
            await self.publish(reply)
            if await answer.wait(timeout_s) is None:
                raise TimeoutError(f"the server did not echo in {timeout_s:g} s")
        finally:
            self.close_inbox(reply)

    @overload
    async def api(self, call: str, body: Any = None, *, timeout_s: float = 5.0) -> dict[str, Any]: ...
    @overload
    async def api(self, call: str, body: Any = None, *, timeout_s: float = 5.0, shape: type[T]) -> T: ...
    async def api(self, call: str, body: Any = None, *, timeout_s: float = 5.0, shape: Any = dict[str, Any]) -> Any:
        """Return the answer of a JetStream API call, `$JS.API.<call>`; what changes nothing twice is asked until then.

        Raises:
            Refused: The server refused.
            BusUnavailable: No answer, JetStream is off, or the replicas have not chosen a leader in time.
        """
        again_s = ASK_AGAIN_S if call.startswith(_REPEATABLE) else None
        give_up = time.monotonic() + timeout_s
        while True:
            left_s = give_up - time.monotonic()
            try:
                return await self._call(call, body, shape, timeout_s=left_s, again_s=again_s)
            except NoResponders as error:
                raise BusUnavailable("JetStream is off on this server; start it with `-js`") from error
            except TimeoutError as error:
                raise BusUnavailable(f"no answer to {' '.join(call.split('.')[:2])} in {timeout_s} s") from error
            except Refused as error:
                if error.err_code not in _NO_LEADER:
                    raise
                if again_s is None or left_s < LEADER_WAIT_S:
                    raise BusUnavailable(f"{error.message}; too few servers of the cluster are up") from error
            await asyncio.sleep(LEADER_WAIT_S)

    async def _call(self, call: str, body: Any, shape: Any, *, timeout_s: float, again_s: float | None) -> Any:
        payload = b"" if body is None else encode(body)
        msg = await self.request(f"$JS.API.{call}", payload, timeout_s=max(timeout_s, 0.01), again_s=again_s)
        try:
            error = decode(msg.data, _Answer, limit=MAX_ANSWER_BYTES).error if b'"error"' in msg.data else None
            answer = msgspec.json.decode(msg.data, type=shape) if error is None else None
        except (Undecodable, ValueError, RecursionError) as cause:
            raise BusUnavailable(f"the answer to {' '.join(call.split('.')[:2])} cannot be read") from cause
        if error is not None:
            if error.err_code in {STREAM_NOT_FOUND, CONSUMER_NOT_FOUND}:
                self.missing.set()
            raise Refused(error.description, error.err_code)
        return answer

    async def stop_delivery(self, subscription: Subscription) -> None:
        """End a subscription after handing over all the server has sent on it."""
        if self._is_deaf():  # no echo could come
            self.end_subscription(subscription)
            return
        try:
            with contextlib.suppress(nats.errors.Error, LoomError, TimeoutError):
                await self._nc._send_unsubscribe(subscription._id)  # the public call drops what is on its way
                await self.echo()
                async with asyncio.timeout(HAND_OVER_S):
                    await subscription._pending_queue.join()  # what has come but waits for its handler
        finally:
            self.end_subscription(subscription)

    def _is_deaf(self) -> bool:
        """Return whether the connection is not read any more: its reader is cancelled when an event loop ends."""
        reading = self._nc._reading_task
        return self._nc.is_connected and reading is not None and bool(reading.done() or reading.cancelling())

    # -- stored messages

    def store(
        self,
        subject: str,
        message: Any,
        *,
        msg_id: str | None = None,
        headers: dict[str, str] | None = None,
        within_s: float = 10.0,
    ) -> Coroutine[Any, Any, PubAck]:
        """Publish into a stream; what is returned, awaited, returns once the server has stored it.

        The message is sent by the call itself, so that others may follow it before it is confirmed. A lost
        acknowledgement is answered by sending again under the same id.

        Args:
            msg_id: `Nats-Msg-Id`: a second message of that id within two minutes is dropped.
            within_s: Seconds after which the outcome stays unknown.

        Raises:
            Conflict: The expected last sequence in `headers` is not the last one.
            Overloaded: The stream is full; or it answers and yet has stored nothing in `within_s`, as with a full disk.
            Refused: The server refused for another reason.
            BusUnavailable: No acknowledgement in `within_s`.
        """
        headers = dict(headers or {})
        if msg_id is not None:
            headers["Nats-Msg-Id"] = msg_id
        stored = _Unconfirmed(subject, message if isinstance(message, bytes) else encode(message), headers)
        stored.reply = self.open_inbox(stored.answer.give)
        try:
            self.send(subject, stored.payload, reply=stored.reply, headers=headers)
        except LoomError:
            self.close_inbox(stored.reply)
            raise
        stored.until = time.monotonic() + within_s
        self._unconfirmed.add(stored)
        return self._confirm(stored, within_s)

    async def _confirm(self, stored: "_Unconfirmed", within_s: float) -> PubAck:
        give_up, repeated = time.monotonic() + within_s, False
        stored.awaited = True
        self._unconfirmed.add(stored)  # again, if it was given up before this was awaited
        try:
            if self._nc.clogged:
                await self._nc.unclog()
            while True:
                if stored.answer.value is None:
                    self._check_reading()
                stored.until = min(time.monotonic() + PUBLISH_TRY_S, give_up)
                msg = await stored.answer.woken()
                if msg is not None:
                    self._failed_publishes = 0
                    if (ack := self._acknowledged(msg)) is not None:
                        return msgspec.structs.replace(ack, duplicate=False) if repeated and ack.duplicate else ack
                    if msg.status == "503":
                        self.missing.set()
                    await asyncio.sleep(UNDECIDED_S)
                elif not stored.anew:
                    self.missing.set()
                    await self._publish_failed()
                if time.monotonic() >= give_up:
                    late = f"the server has not confirmed a message in {within_s} s"
                    if msg is None and await self._is_led(stored.subject):
                        raise Overloaded(f"{late}, though its stream answers: the disk may be full")
                    raise BusUnavailable(late)
                await self._store_again(stored)
                repeated = True
        finally:
            self.close_inbox(stored.reply)
            self._unconfirmed.discard(stored)

    def _check_reading(self) -> None:
        """Return if an acknowledgement may still come.

        Raises:
            BusUnavailable: Nothing is read any more.
        """
        if self._nc.is_closed:
            raise BusUnavailable("the connection was closed before the server had confirmed", url=self.address)
        if self._is_deaf():
            raise BusUnavailable("the event loop ends before the server has confirmed", url=self.address)

    def _acknowledged(self, msg: Msg) -> PubAck | None:
        """Return the acknowledgement; None where it has to be asked for again."""
        try:
            return _read_ack(msg)
        except Undecodable as error:  # not the server's: anyone may publish to a reply subject
            self.discards.add("ack_undecodable", reason=error.message)
            return None

    async def _store_again(self, stored: "_Unconfirmed") -> None:
        """Send once more, with an inbox of its own: a late answer to the first sending may say less than the next."""
        self.close_inbox(stored.reply)
        stored.answer, stored.anew = Awaited(), False
        stored.reply = self.open_inbox(stored.answer.give)
        await self.publish(stored.subject, stored.payload, reply=stored.reply, headers=stored.headers)

    async def _is_led(self, subject: str) -> bool:
        """Whether the stream of `subject` has a leader that answers, so that silence is not the connection's fault."""
        try:
            streams = (await self.api("STREAM.NAMES", {"subject": subject}, timeout_s=1))["streams"] or []
            for stream in streams:
                await self.api(f"STREAM.INFO.{stream}", timeout_s=1)
        except (LoomError, KeyError):
            return False
        return bool(streams)

    async def _publish_failed(self) -> None:
        self._failed_publishes += 1
        if self._failed_publishes < 2 or not self._nc.is_connected:  # noqa: PLR2004 - one may be chance
            return
        self._failed_publishes = 0
        await self.leave_stalled_server()

    async def leave_stalled_server(self) -> None:
        """Connect again, to another server where there are several; a single one is left only if it answers nothing.

        One of several servers may live and yet be cut off from the others: it answers, and stores nothing. Calls that
        come before a new connection is 4 s old change nothing.
        """
        if self._leaving or self.settled_s < SETTLED_S:
            return
        self._leaving = True
        try:
            if len(self._nc.servers) > 1 or not await self._answers():
                log.warning("connection_stalled")
                await self._reconnect()
        finally:
            self._leaving = False

    async def _answers(self) -> bool:
        try:
            await self.echo(timeout_s=1)
        except (TimeoutError, LoomError):
            return False
        return True

    def _on_reply(self, msg: Msg) -> None:
        sink = self._sinks.get(msg.subject)
        if sink is None:
            return  # too late: nobody waits any more
        sink(msg)

    async def _watch_unconfirmed(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            for stored in [each for each in self._unconfirmed if now >= each.until]:
                if stored.awaited:
                    stored.answer.wake()
                else:
                    self.close_inbox(stored.reply)
                    self._unconfirmed.discard(stored)

    def _send_again(self) -> None:
        """What was not confirmed has gone with the old connection."""
        for stored in self._unconfirmed:
            stored.anew = True
        self._wake_unconfirmed()


def _read_ack(msg: Msg) -> PubAck | None:
    """Return the acknowledgement; None while it is undecided whether the message will be stored.

    Raises:
        Undecodable: The message is no acknowledgement.
        Conflict, Overloaded, Refused: The server refused.
    """
    if msg.status == "503":  # a stream without a leader, or none at all
        return None
    reply = decode(msg.data, _PubReply)
    if reply.error is None:
        return reply
    error = reply.error
    if error.err_code == _IN_PROCESS or error.err_code in _NO_LEADER:
        return None
    if error.err_code in _WRONG_LAST:
        raise Conflict(error.description, error.err_code)
    if error.err_code in _FULL:
        raise Overloaded("the bus is full; try again later")
    raise Refused(error.description, error.err_code)
