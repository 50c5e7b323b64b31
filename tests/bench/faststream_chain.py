"""Six no-op hops by FastStream: JetStream pull subscribers, one a hop, with pydantic models as in its guide."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from itertools import count

from bench.measure import closed_loop
from bench.raw_pipe import FILLER_BYTES, HOPS
from loom.runner.server.nats_server import NatsServer

BATCH = 256
"""Messages fetched at a time."""
MISSING = "not installed: pip install '.[bench]'"


def installed() -> bool:
    return find_spec("faststream") is not None


class Chain:
    """The chain in this process; `send` begins a task and `finish` ends it."""

    def __init__(self, send: Callable[[int], Awaitable[object]], server_pid: int) -> None:
        self.processes = {"server": server_pid, "chain": os.getpid()}
        self._send = send
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[None]] = {}

    async def carry(self, tasks: int, at_once: int) -> list[float]:
        return await closed_loop(self._once, tasks, at_once)

    def finish(self, number: int) -> None:
        self._waiting.pop(number).set_result(None)

    async def _once(self) -> None:
        number = next(self._numbers)
        over = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._send(number)
        await over


@asynccontextmanager
async def faststream_chain() -> AsyncIterator[Chain]:
    """Run the chain on a server of its own."""
    from faststream.nats import JStream, NatsBroker, PullSub  # noqa: PLC0415 - an extra
    from nats.js.api import ConsumerConfig, RetentionPolicy, StorageType  # noqa: PLC0415
    from pydantic import BaseModel  # noqa: PLC0415 - comes with it

    class Task(BaseModel):
        number: int
        hop: int
        task_id: str = "0" * 26
        domain: str = "code"
        description: str = "x" * FILLER_BYTES
        priority: str = "normal"

    server = NatsServer()
    server.start()
    broker = NatsBroker(server.url, logger=None)
    stream = JStream("FS", subjects=["fs.>"], retention=RetentionPolicy.WORK_QUEUE, storage=StorageType.FILE)

    async def send(number: int) -> None:
        await broker.publish(Task(number=number, hop=0), "fs.1", stream="FS")

    chain = Chain(send, server.pid)

    def hop(number: int) -> None:
        async def handle(task: Task) -> Task:
            return task.model_copy(update={"hop": number})

        async def end(task: Task) -> None:
            chain.finish(task.number)

        taken = broker.subscriber(
            f"fs.{number}",
            stream=stream,
            durable=f"hop{number}",
            config=ConsumerConfig(max_ack_pending=10_000),
            pull_sub=PullSub(batch_size=BATCH),
        )
        if number == HOPS:
            taken(end)
        else:
            taken(broker.publisher(f"fs.{number + 1}", stream=stream)(handle))

    try:
        for number in range(1, HOPS + 1):
            hop(number)
        async with broker:
            await broker.start()
            yield chain
    finally:
        server.stop()
