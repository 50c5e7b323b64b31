"""How many pieces of text a client gets a second, from one host by way of EXECUTE: in order, none lost."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from support.command import LOOM

from bench.bench_cluster import SLOTS, WITHIN_S, BenchCluster, bench_cluster
from bench.measure import cpu_s, verdict
from loom.bus import task_client
from loom.bus.bus import Bus
from loom.schemas.events import TextDelta
from loom.schemas.task import TaskAd

CHATTY_AGENT = Path(__file__).with_name("chatty_agent.py")
WANTED_PER_S = 50_000
MANY = 100
ON_ONE, ON_MANY = 90_000, 1000
"""Pieces of a task alone, and of each of many."""


def piece(number: int) -> str:
    """Return the text of a piece: three characters that distinguish it from its neighbours."""
    return f"{number % 1000:03}"


@dataclass(frozen=True)
class ReceivedDeltas:
    """What a client has got."""

    pieces: int
    messages: int
    whole: bool
    """Whether every piece came, in order."""
    began: float
    ended: float


async def listen(bus: Bus, pieces: int) -> ReceivedDeltas:
    """Have one task yield so many pieces, and return what has come of them."""
    began = time.perf_counter()  # the handing in is part of it: what waits to be read counts for nothing
    ad = TaskAd(domain="talk", description="talk", estimated_complexity=0.3, context={"pieces": pieces})
    handle = await task_client.publish(bus, ad)
    texts: list[str] = []
    ended = began
    async for delta in handle.events():
        if isinstance(delta.event, TextDelta):
            ended = time.perf_counter()
            texts.append(delta.event.text)
    result = await handle.result(WITHIN_S)
    if not result.success:
        raise RuntimeError(f"a task failed: {result.error}")
    text = "".join(texts)
    whole = text == "".join(piece(number) for number in range(pieces))
    return ReceivedDeltas(pieces=len(text) // 3, messages=len(texts), whole=whole, began=began, ended=ended)


async def rate(running: BenchCluster, count: int, pieces: int) -> str:
    """Return a report of so many tasks side by side."""
    before = {name: cpu_s(pid) for name, pid in running.processes.items()}
    received = await asyncio.gather(*(listen(running.bus, pieces) for _ in range(count)))
    took = {name: 1e6 * (cpu_s(pid) - before[name]) / count / pieces for name, pid in running.processes.items()}
    seconds = max(each.ended for each in received) - min(each.began for each in received)
    got, messages = sum(each.pieces for each in received), sum(each.messages for each in received)
    broken, lost = sum(not each.whole for each in received), count * pieces - got
    per_s = got / seconds
    order = f"{lost} LOST, {broken} of {count} tasks not as sent" if broken else "in order, none lost"
    cpu = "CPU µs each: " + ", ".join(f"{name} {each:.0f}" for name, each in took.items())
    kept = verdict(per_s >= WANTED_PER_S and not broken)
    return f"{per_s:8,.0f} deltas/s in {messages:,} messages, {order}  ({kept}: ≥ {WANTED_PER_S:,}); {cpu}"


@asynccontextmanager
async def deaf_client(url: str) -> AsyncIterator[None]:
    """Subscribe to all deltas and never read one."""
    host, _, port = url.removeprefix("nats://").rpartition(":")
    with socket.create_connection((host, int(port))) as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        options = json.dumps({"verbose": False, "pedantic": False}).encode()
        plain.sendall(b"CONNECT " + options + b"\r\nSUB loom.delta.> 1\r\nPING\r\n")
        yield


async def many_deltas(*, quick: bool) -> None:
    """Deltas a second on one task, on a hundred, and next to a client that does not read."""
    scale = 10 if quick else 1
    async with bench_cluster() as running:
        await running.phases()
        words = (*LOOM, "host", "run", str(CHATTY_AGENT), "--slots", str(SLOTS))
        await running.start("host", *words, output='"ready"', LOOM_LOG_LEVEL="info")
        await running.connect()
        await rate(running, 1, 100)
        print("on one task:             ", await rate(running, 1, ON_ONE // scale), flush=True)
        print(f"on {MANY} tasks:            ", await rate(running, MANY, ON_MANY // scale), flush=True)
        async with deaf_client(running.url):
            print("one task, a deaf client: ", await rate(running, 1, ON_ONE // scale), flush=True)
