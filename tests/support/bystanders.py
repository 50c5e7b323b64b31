"""A stream of honest tasks next to tasks, agents and messages that burden the same cluster.

Run as a script for the long measurement: `python -m support.bystanders --seconds 60`, with tests/ on PYTHONPATH.
"""

import argparse
import asyncio
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.runner.server.nats_server import NatsServer
from loom.schemas.envelope import PHASES
from loom.schemas.errors import LoomError
from support.kill_schedule import ProcessCluster
from support.wait import until

AGENTS = Path(__file__).parents[1] / "data" / "troublesome_agents.py"
HOSTS = ("honest-1", "honest-2", "echo", "interrupts-1", "interrupts-2", "blocks", "uncancellable", "endless")
PER_S = 20
ANSWER_S = 30.0
BURDEN_INTERVAL_S = 1.0
"""Seconds between two burdens of one kind."""
MOST_TIMES = 3.0
MOST_MORE_S = 2.0
FLOOR_S = 0.1
"""A lower p95 counts as this: a host that stops answering costs the first few auctions a bid window each."""


@dataclass
class Stream:
    """Durations and faults of a stream of tasks."""

    took_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """One sentence for each task that did not succeed at its first attempt."""

    @property
    def p95_s(self) -> float:
        return sorted(self.took_s)[int(0.95 * len(self.took_s))]

    @property
    def slowest_s(self) -> float:
        return max(self.took_s)

    def __str__(self) -> str:
        return (
            f"{len(self.took_s)} tasks, p95 {self.p95_s * 1000:.0f} ms, slowest {self.slowest_s * 1000:.0f} ms, "
            f"{len(self.faults)} faults"
        )


class Client:
    """Submits ads as JSON requests to the submit subject."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def submit(self, tool: str, *, timeout_s: float = 60, **ad: Any) -> dict[str, Any]:
        """Submit a task that only nodes with `tool` can run, and return the answer."""
        body = {
            "domain": "code",
            "description": "work",
            "estimated_complexity": 0.1,
            "required_tools": [tool],
            "timeout_s": timeout_s,
            **ad,
        }
        reply = await self._bus.requests.request(
            self._bus.subjects.submit, msgspec.json.encode(body), timeout_s=ANSWER_S
        )
        answer: dict[str, Any] = msgspec.json.decode(reply.data)
        return answer

    async def stream(self, seconds: float) -> Stream:
        """Submit honest tasks at a constant rate for that time, and return their durations and faults."""
        stream = Stream()

        async def submit(number: int) -> None:
            started = time.monotonic()
            try:
                answer = await self.submit("honest", description=f"entry {number}")
            except (LoomError, TimeoutError) as error:
                stream.faults.append(f"entry {number}: {error}")
            else:
                if (answer.get("state"), answer.get("attempts")) != ("succeeded", 1):
                    stream.faults.append(f"entry {number}: {answer}")
            stream.took_s.append(time.monotonic() - started)

        async with asyncio.TaskGroup() as group:
            for number in range(int(seconds * PER_S)):
                group.create_task(submit(number))
                await asyncio.sleep(1 / PER_S)
        return stream


class ForgedHost:
    """A host made of plain messages whose results contain given raw fields."""

    def __init__(self, bus: Bus, tool: str, result: bytes) -> None:
        self._bus, self._tool, self._result = bus, tool, result
        self._host_id = f"forged-{tool}"
        self.runs = 0

    async def __aenter__(self) -> Self:
        subjects = self._bus.subjects
        await self._bus.connection.subscribe(subjects.of("auction", "*"), self._on_call)
        await self._bus.connection.subscribe(subjects.of("run", "local", self._host_id), self._on_run)
        self._beat = self._bus.tasks.spawn(self._announce(), name="announce")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._beat.cancel()

    async def _announce(self) -> None:
        while True:
            body = {"nodes": [{"node_id": self._host_id, "slots": 4}]}
            await self._bus.connection.publish(
                self._bus.subjects.of("host", "local", self._host_id), msgspec.json.encode(body)
            )
            await asyncio.sleep(1)

    async def _on_call(self, msg: Msg) -> None:
        call = msgspec.json.decode(msg.data)
        if self._tool in call.get("required_tools", ()):
            bid = {"node_id": self._host_id, "self_rating": 1.0, "tools": [self._tool]}
            subject = self._bus.subjects.of("offer", "local", self._host_id, *call["answer_to"].split("."))
            await self._bus.connection.publish(subject, msgspec.json.encode({"bids": [bid]}))

    async def _on_run(self, msg: Msg) -> None:
        self.runs += 1
        for n, kind in enumerate(("accepted", "started")):
            await self._bus.connection.publish(msg.reply, msgspec.json.encode({"seq": n, "kind": kind}))
        last = b'{"seq": 2, "kind": "result", "result": {"content": "forged", %s}}' % self._result
        await self._bus.connection.publish(msg.reply, last)


def schema_bomb(doublings: int = 60) -> dict[str, Any]:
    """Return a JSON Schema of about 4 kB whose references double that many times."""
    parts: dict[str, Any] = {"a0": {"type": "object"}}
    for n in range(1, doublings + 1):
        parts[f"a{n}"] = {"allOf": [{"$ref": f"#/$defs/a{n - 1}"}] * 2}
    return {"$ref": f"#/$defs/a{doublings}", "$defs": parts}


def burdens() -> Mapping[str, Callable[[Client], Awaitable[Any]]]:
    """Return burden name -> function that applies it once."""
    return {
        "schema bomb": lambda client: client.submit("echo", description="{}", accept={"json_schema": schema_bomb()}),
        "pattern bomb": lambda client: client.submit("echo", accept={"pattern": "a{1000000}"}),
        "400-digit integer": lambda client: client.submit("integer"),
        "1e308 seconds": lambda client: client.submit("duration"),
        "KeyboardInterrupt": lambda client: client.submit("interrupts", timeout_s=20),
        "blocked loop": lambda client: client.submit("blocks", timeout_s=20),
        "swallowed cancel": lambda client: client.submit("uncancellable", timeout_s=2),
        "endless generator": lambda client: client.submit("endless", timeout_s=5),
    }


@asynccontextmanager
async def repeated(burden: Callable[[Client], Awaitable[Any]], client: Client) -> AsyncIterator[None]:
    """Apply a burden each second for the length of the block."""

    async def once() -> None:
        with suppress(LoomError, TimeoutError):  # other tests check how it ends
            await burden(client)

    async def repeat() -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(once())
                await asyncio.sleep(BURDEN_INTERVAL_S)

    repeating = asyncio.create_task(repeat())
    try:
        yield
        assert not repeating.done(), "the burden has stopped by itself"
    finally:
        repeating.cancel()
        await asyncio.gather(repeating, return_exceptions=True)


@dataclass(frozen=True)
class BurdenedCluster:
    """A cluster of six phase processes with honest and troublesome hosts, and a client of it."""

    cluster: ProcessCluster
    client: Client

    async def measure(self, seconds: float) -> dict[str, Stream]:
        """Return the stream without a burden, as `alone`, and the same stream under each burden."""
        streams = {"alone": await self.client.stream(seconds)}
        for name, burden in burdens().items():
            async with repeated(burden, self.client):
                streams[name] = await self.client.stream(seconds)
        return streams

    def ended(self) -> list[str]:
        """Return the names of the processes that have ended."""
        return [name for name, process in self.cluster.processes.items() if not process.running]

    async def stop(self, name: str, within_s: float) -> None:
        """Send SIGTERM to a process, and check that it ends in time."""
        process = self.cluster.processes[name]
        async with asyncio.timeout(within_s):
            await process.kill(signal.SIGTERM)


@asynccontextmanager
async def burdened_cluster(folder: Path, **env: str) -> AsyncIterator[BurdenedCluster]:
    """Start the cluster for the length of the block."""
    server = NatsServer(folder / "store")
    server.start()
    phases = {name: [name] for name in PHASES}
    try:
        async with (
            Bus(server.url) as bus,
            ProcessCluster(server, folder, phases, HOSTS, AGENTS, {"LOOM_LOG_LEVEL": "info", **env}) as cluster,
            ForgedHost(bus, "integer", b'"prompt_tokens": 1%s' % (b"0" * 400)),
            ForgedHost(bus, "duration", b'"duration_s": 1e308'),
        ):
            client = Client(bus)
            await until(lambda: is_up(bus, client), within_s=60, what="the cluster is up")
            yield BurdenedCluster(cluster, client)
    finally:
        await asyncio.to_thread(server.stop)


async def is_up(bus: Bus, client: Client) -> bool:
    try:
        await topology.stream_state(bus, "DEAD")
        answers = [await client.submit(tool, description="{}", timeout_s=5) for tool in ("honest", "echo")]
    except (LoomError, TimeoutError):
        return False
    return all(answer.get("state") == "succeeded" for answer in answers)


def check(streams: Mapping[str, Stream]) -> None:
    """Check that no burden has cost the stream a task, an attempt or much time.

    Raises:
        AssertionError: A burden has.
    """
    alone = streams["alone"]
    for name, stream in streams.items():
        assert not stream.faults, f"under {name}: {stream.faults[:3]}"
        assert stream.p95_s <= MOST_TIMES * max(alone.p95_s, FLOOR_S), f"under {name}: {stream}; alone: {alone}"
        assert stream.slowest_s <= alone.slowest_s + MOST_MORE_S, f"under {name}: {stream}; alone: {alone}"


async def measure_and_check(folder: Path, seconds: float) -> dict[str, Stream]:
    """Measure and check the stream, and check that no process ended and the uncancellable host stops in time.

    Raises:
        AssertionError: A check failed.
        TimeoutError: The uncancellable host does not stop.
    """
    async with burdened_cluster(folder, LOOM_DRAIN_TIMEOUT_S="3") as cluster:
        streams = await cluster.measure(seconds)
        for name, stream in streams.items():
            print(f"{name:>20}: {stream}")
        check(streams)
        assert not cluster.ended(), f"ended: {cluster.ended()}"
        await cluster.stop("uncancellable", within_s=5)
    return streams


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--keep", type=Path, help="Folder for logs and streams.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as private:
        folder = args.keep or Path(private)
        folder.mkdir(parents=True, exist_ok=True)
        asyncio.run(measure_and_check(folder, args.seconds))


if __name__ == "__main__":
    main()
