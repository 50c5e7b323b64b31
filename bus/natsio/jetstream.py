"""The JetStream API, and publishing into streams."""

import asyncio
import time
from typing import Any, TypeVar, overload

import msgspec

from loom.bus.logs.discards import Discards
from loom.bus.natsio.connection import Connection
from loom.bus.natsio.publishing import PubAckFuture, Publisher
from loom.bus.natsio.requests import NoResponders, Requests
from loom.bus.natsio.server_errors import MISSING, NO_LEADER, ApiError, Refused
from loom.schemas.base import Message, Undecodable, decode, encode
from loom.schemas.errors import BusUnavailable

T = TypeVar("T")

LEADER_WAIT_S = 0.25
REPEAT_S = 1.0
"""Seconds without a reply after which an idempotent call is repeated: its server may have died or lost its lead."""
MAX_REPLY_BYTES = 64 * 2**20
"""Most bytes of a reply: the largest message that a server can be configured to accept."""
_REPEATABLE = ("INFO", "STREAM.INFO.", "STREAM.MSG.GET.", "STREAM.CREATE.", "CONSUMER.INFO.", "CONSUMER.CREATE.")


class _Reply(Message, frozen=True, kw_only=True):
    error: ApiError | None = None


class JetStream:
    """Calls the JetStream API, and publishes into streams.

    Args:
        discards: Counts the replies that cannot be read.
    """

    def __init__(self, connection: Connection, requests: Requests, discards: Discards) -> None:
        self.connection = connection
        self.requests = requests
        self.discards = discards
        self.missing = asyncio.Event()
        """Set when a stream or consumer may be missing on the server; `loom.bus.upkeep` creates it again."""
        self._publisher = Publisher(connection, requests, discards, self)
        connection.on_reconnect(self._publisher.publish_again)
        connection.on_reconnect(self.missing.set)  # the server may have come back with an empty store

    async def start(self) -> None:
        """Start to repeat publishes without an acknowledgement; to be called once after each `connect`."""
        self.connection.tasks.spawn(self._publisher.watch(), name="watch unacknowledged", essential=True)

    def close(self) -> None:
        """Fail the publishes without an acknowledgement: none can arrive any more."""
        self._publisher.close()

    def publish(
        self,
        subject: str,
        message: Any,
        *,
        msg_id: str | None = None,
        headers: dict[str, str] | None = None,
        within_s: float = 10.0,
    ) -> PubAckFuture:
        """Send the message immediately and return an awaitable that resolves to the server's PubAck.

        Messages that are published later follow this one, whether it is acknowledged or not. Without an
        acknowledgement the message is sent again under the same id, also if the PubAck is not awaited.

        Args:
            msg_id: `Nats-Msg-Id`: the server drops a second message with this id within two minutes.
            within_s: Seconds after which the PubAck is given up, and it stays unknown whether the message is stored.

        Raises:
            BusUnavailable, PayloadTooLarge, WrongEventLoop: As `Connection.publish`; nothing was sent.
        """
        payload = message if isinstance(message, bytes) else encode(message)
        headers = dict(headers or {})
        if msg_id is not None:
            headers["Nats-Msg-Id"] = msg_id
        return self._publisher.publish(subject, payload, headers, within_s)

    @overload
    async def api(self, call: str, body: Any = None, *, timeout_s: float = 5.0) -> dict[str, Any]: ...
    @overload
    async def api(self, call: str, body: Any = None, *, timeout_s: float = 5.0, shape: type[T]) -> T: ...
    async def api(self, call: str, body: Any = None, *, timeout_s: float = 5.0, shape: Any = dict[str, Any]) -> Any:
        """Return the reply to `$JS.API.<call>`; an idempotent call is repeated until the server replies.

        Args:
            call: Subject of the call after `$JS.API.`, for example `STREAM.INFO.LOOM_TASKS`.
            body: Body of the request; default: none.
            timeout_s: Longest wait, in seconds.
            shape: Type of the reply.

        Raises:
            Refused: The server refused the call.
            BusUnavailable: The server does not reply, JetStream is off, or the replicas have not elected a leader.
        """
        again_s = REPEAT_S if call.startswith(_REPEATABLE) else None
        give_up = time.monotonic() + timeout_s
        while True:
            left_s = give_up - time.monotonic()
            try:
                return await self._call(call, body, shape, timeout_s=left_s, again_s=again_s)
            except NoResponders as error:
                raise BusUnavailable("JetStream is off on this server; start it with `-js`") from error
            except TimeoutError as error:
                raise BusUnavailable(f"no reply to {' '.join(call.split('.')[:2])} within {timeout_s} s") from error
            except Refused as error:
                if error.err_code not in NO_LEADER:
                    raise
                if again_s is None or left_s < LEADER_WAIT_S:
                    raise BusUnavailable(f"{error.message}; too few servers of the cluster are up") from error
            await asyncio.sleep(LEADER_WAIT_S)

    async def _call(self, call: str, body: Any, shape: Any, *, timeout_s: float, again_s: float | None) -> Any:
        payload = b"" if body is None else encode(body)
        msg = await self.requests.request(f"$JS.API.{call}", payload, timeout_s=max(timeout_s, 0.01), again_s=again_s)
        try:
            error = decode(msg.data, _Reply, limit=MAX_REPLY_BYTES).error if b'"error"' in msg.data else None
            reply = msgspec.json.decode(msg.data, type=shape) if error is None else None
        except (Undecodable, ValueError, RecursionError) as cause:
            raise BusUnavailable(f"the reply to {' '.join(call.split('.')[:2])} cannot be read") from cause
        if error is not None:
            if error.err_code in MISSING:
                self.missing.set()
            raise Refused(error.description, error.err_code)
        return reply
