"""What the bus itself costs: a message through six durable consumers, by nothing but nats-py used as fast as it goes.

File storage, a work queue, one subscription for all that is pulled and one for all PubAcks, no future and no task per
message. A hop publishes the next one, awaits its PubAck, and acks: so that nothing is lost, as in the loop.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from typing import Any

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from loom.runner.server.nats_server import NatsServer

HOPS = 6
STREAM = "RAW"
BATCH = 512
"""Messages asked for at a time."""
FILLER_BYTES = 600


class RawPipe:
    """Six hops on one connection, in this process."""

    def __init__(self, nc: Client, server_pid: int) -> None:
        self.processes = {"server": server_pid, "pipe": os.getpid()}
        self._nc = nc
        self._inbox = nc.new_inbox()
        self._pull, self._acks = f"{self._inbox}.pull", f"{self._inbox}.ack"
        self._owed: dict[str, str | None] = {}
        """Reply subject of a publish -> what is to be acked once it is confirmed; None for what a client publishes."""
        self._wanted = dict.fromkeys(range(1, HOPS + 1), 0)
        """Hop -> messages asked for that have not come."""
        self._tokens = count()
        self._numbers = count()
        self._finished: dict[int, Callable[[], None]] = {}
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        await self._api(
            f"STREAM.CREATE.{STREAM}",
            {"name": STREAM, "subjects": ["raw.>"], "retention": "workqueue", "storage": "file", "num_replicas": 1},
        )
        for hop in range(1, HOPS + 1):
            config = {
                "durable_name": f"hop{hop}",
                "filter_subject": f"raw.{hop}",
                "ack_policy": "explicit",
                "max_ack_pending": -1,
            }
            call = f"CONSUMER.CREATE.{STREAM}.hop{hop}.raw.{hop}"
            await self._api(call, {"stream_name": STREAM, "config": config})
        await self._nc.subscribe(f"{self._pull}.*", cb=self._on_message, pending_msgs_limit=-1, pending_bytes_limit=-1)
        await self._nc.subscribe(f"{self._acks}.*", cb=self._on_ack, pending_msgs_limit=-1, pending_bytes_limit=-1)
        for hop in self._wanted:
            await self._ask(hop)

    async def carry(self, tasks: int, at_once: int) -> list[float]:
        times: list[float] = []
        left = iter(range(tasks))
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def finish(started: float) -> None:
            times.append(time.perf_counter() - started)
            if len(times) == tasks:
                over.set_result(None)

        async def begin() -> None:
            if next(left, None) is None:
                return
            number = next(self._numbers)
            self._finished[number] = partial(finish, time.perf_counter())
            await self._publish(1, msgspec.json.encode({**TASK, "number": number}), None)

        self._begin = begin
        for _ in range(min(at_once, tasks)):
            await begin()
        await asyncio.wait([over, self._failed], return_when=asyncio.FIRST_COMPLETED)
        if self._failed.done():
            self._failed.result()
        return times

    async def _publish(self, hop: int, body: bytes, owed: str | None) -> None:
        reply = f"{self._acks}.{next(self._tokens)}"
        self._owed[reply] = owed
        await self._nc.publish(f"raw.{hop}", body, reply)

    async def _on_message(self, msg: Msg) -> None:
        if msg.headers is not None:  # only messages of the server itself have any
            self._fail(f"a pull was refused: {msg.headers}")
            return
        hop = int(msg.subject[4:])
        self._wanted[hop] -= 1
        task = msgspec.json.decode(msg.data)
        task["hop"] = hop
        if hop < HOPS:
            await self._publish(hop + 1, msgspec.json.encode(task), msg.reply)
        else:
            await self._nc.publish(msg.reply)
            self._finished.pop(task["number"])()
            await self._begin()
        if self._wanted[hop] <= BATCH // 2:
            await self._ask(hop)

    async def _on_ack(self, msg: Msg) -> None:
        if b'"error"' in msg.data or not msg.data:
            self._fail(f"a message was not stored: {msg.data!r}")
            return
        owed = self._owed.pop(msg.subject)
        if owed is not None:
            await self._nc.publish(owed)

    async def _ask(self, hop: int) -> None:
        self._wanted[hop] += BATCH
        call = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.hop{hop}"
        await self._nc.publish(call, b'{"batch":%d}' % BATCH, f"{self._pull}.{hop}")

    async def state(self) -> dict[str, Any]:
        """Return what the server reports of the stream."""
        info = await self._api(f"STREAM.INFO.{STREAM}", {})
        state: dict[str, Any] = info["state"]
        return state

    async def _api(self, call: str, body: dict[str, Any]) -> dict[str, Any]:
        msg = await self._nc.request(f"$JS.API.{call}", msgspec.json.encode(body), timeout=10)
        answer: dict[str, Any] = msgspec.json.decode(msg.data)
        if "error" in answer:
            raise RuntimeError(msg.data.decode())
        return answer

    def _fail(self, why: str) -> None:
        if not self._failed.done():
            self._failed.set_exception(RuntimeError(why))


TASK = {
    "ad": {"task_id": "0" * 26, "domain": "code", "description": "x" * FILLER_BYTES, "priority": "normal"},
    "deadline": 0.0,
}
"""About 700 bytes of JSON."""


@asynccontextmanager
async def raw_pipe() -> AsyncIterator[RawPipe]:
    """Run the pipe on a server of its own."""
    server = NatsServer()
    server.start()
    try:
        nc = await nats.connect(server.url)
        try:
            pipe = RawPipe(nc, server.pid)
            await pipe.start()
            yield pipe
        finally:
            await nc.close()
    finally:
        server.stop()
