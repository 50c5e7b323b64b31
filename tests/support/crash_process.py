"""Phases and node hosts in processes of their own, to be killed at a named point or stopped for a while.

The processes are forked from one that has imported everything already, so that each starts in a few milliseconds.
"""

import asyncio
import importlib
import multiprocessing
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import structlog

from loom.bus.bus import Bus
from loom.bus.bus import _buses as buses
from loom.bus.hops.hop_loop import HopLoop
from loom.bus.logs import logger
from loom.bus.natsio.connection import Connection as BusConnection
from loom.bus.natsio.kv import Bucket
from loom.bus.natsio.publishing import PubAckFuture
from loom.bus.subjects import Subjects
from loom.phases.scale.division import Division
from loom.phases.sense.client_api import ClientApi
from loom.runner.services import running_nodes, running_phases
from loom.schemas.envelope import Phase
from loom.schemas.run import RunRequest
from support.logs import output
from support.nodes import node
from support.wait import until

WITHIN_S = 30
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["loom.runner.services", "loom.types", "pytest"])

QUICK: dict[str, float] = {
    "loom.bus.topology.ACK_WAIT_S": 1,
    "loom.bus.hops.hop_loop.IN_PROGRESS_S": 0.25,
    "loom.agents.host.node_host.HEARTBEAT_S": 0.25,
}
"""What a replica that is gone is replaced after, in tests."""
IMPATIENT = {"loom.phases.execute.run_stream.SILENCE_S": 2.0}
"""What a host that is silent is given up after."""


def each_setting(values: Mapping[str, float]) -> list[tuple[Any, str, float]]:
    """Return module, name and value of each."""
    split = [(*name.rpartition("."), value) for name, value in values.items()]
    return [(importlib.import_module(module), name, value) for module, _, name, value in split]


# -- points

Patch = Callable[[Callable[[], None]], None]
"""Has what it is given called at a point, the first time it is reached."""


def before(owner: type, method: str, when: Callable[..., bool] = lambda *_: True) -> Patch:
    """Fall instead of calling a method."""
    return _replace(owner, method, when, call=False)


def after(owner: type, method: str, when: Callable[..., bool] = lambda *_: True) -> Patch:
    """Fall once a method has returned and the server has what it sent."""
    return _replace(owner, method, when, call=True)


def sent(owner: type, method: str, when: Callable[..., bool] = lambda *_: True) -> Patch:
    """Fall instead of calling a method, once the server has what was sent before."""
    return _replace(owner, method, when, call=False, echo=True)


def stored(*families: str) -> Patch:
    """Fall once the server has a message for a stream, and before its word of that is read."""
    return sent(PubAckFuture, "ack", lambda future: _on(*families)(future, future.subject))


def _replace(owner: type, method: str, when: Callable[..., bool], *, call: bool, echo: bool = False) -> Patch:
    original: Callable[..., Awaitable[Any]] = getattr(owner, method)

    def patch(fall: Callable[[], None]) -> None:
        async def fatal(self: Any, *args: Any, **options: Any) -> Any:
            if not when(self, *args):
                return await original(self, *args, **options)
            setattr(owner, method, original)
            if not call:
                if echo:
                    await bus_of(self).requests.flush()
                fall()
            result = await original(self, *args, **options)
            if call:
                await bus_of(self).requests.flush()
                fall()
            return result

        setattr(owner, method, fatal)

    return patch


def bus_of(owner: Any) -> Bus:
    """Return the bus that an object of the code under test uses."""
    connection = owner if isinstance(owner, BusConnection) else getattr(owner, "_connection", None)
    if isinstance(owner, Bucket):
        connection = owner._jetstream.connection
    if connection is not None:
        return next(bus for bus in list(buses) if bus.connection is connection)
    return owner if isinstance(owner, Bus) else getattr(owner, "_bus", None) or owner.bus


def _on(*families: str) -> Callable[..., bool]:
    def addressed(_owner: Any, subject: str, *_: Any) -> bool:
        parsed = Subjects(subject.partition(".")[0]).parse(subject)
        return parsed is not None and parsed.family in families

    return addressed


def _in(bucket: str) -> Callable[..., bool]:
    return lambda self, *_: self._prefix.endswith(f"_{bucket}.")


def _becomes(state: str) -> Callable[..., bool]:
    return lambda self, _key, value, *_: self._prefix.endswith("_plans.") and value.state == state


def begins_a_task(future: PubAckFuture) -> bool:
    """Return whether a message goes to SENSE as a subtask or a delegated task does."""
    parsed = Subjects(future.subject.partition(".")[0]).parse(future.subject)
    return parsed is not None and parsed.tokens.get("phase") == "sense"


def _at(checkpoint: str) -> Callable[..., bool]:
    return lambda _loop, name: name == checkpoint


POINTS: dict[str, Patch] = {
    "fetched": before(HopLoop, "_checkpoint", _at("fetched")),
    "handled, unpublished": before(HopLoop, "_checkpoint", _at("handled")),
    "published, unconfirmed": stored("task", "later"),
    "confirmed, unacked": before(HopLoop, "_checkpoint", _at("before ack")),
    "acked": sent(HopLoop, "_checkpoint", _at("acked")),
    "recorded": after(Bucket, "update", _in("records")),
    "relayed": after(BusConnection, "publish", _on("delta")),
    "rewarded": sent(BusConnection, "publish", _on("result")),
    "reward stored": stored("reward"),
    "announced": after(BusConnection, "publish", _on("result")),
    "learned": after(Bucket, "update", _in("nodes")),
    "submission stored": stored("intake"),
    "cancel told": after(ClientApi, "_publish_to_evaluate"),
    "cancel recorded": after(ClientApi, "_cancel_task"),
    "plan stored": after(Bucket, "create", _in("plans")),
    "timer set": stored("later"),
    "subtask begun": sent(PubAckFuture, "ack", begins_a_task),
    "plan noted": after(Bucket, "update", _becomes("running")),
    "plan joined": after(Bucket, "update", _becomes("joining")),
    "timer dropped": after(Division, "_remove_timer"),
    "plan over": after(Bucket, "update", _becomes("done")),
    "subtask cancelled": after(BusConnection, "publish", _on("cancel")),
    "none": lambda _fall: None,
}
"""Where a process may die or stop -> how to have it do so."""


# -- processes


class Child:
    """A process doing `work`, which gets what it says through; a context manager that kills what is left.

    Args:
        work: An async function of `say`, `orders` and `args`: says "ready" once it works, and ends after `orders.over`.
    """

    def __init__(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        self._pipe, self._theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=_main, args=(self._theirs, work, args), daemon=True)
        self.said: list[Any] = []
        """Words, and log events as dicts, oldest first."""

    async def __aenter__(self) -> Self:
        self.process.start()
        self._theirs.close()
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._hear)
        await self.says("ready")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        await self._gone()
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        self._pipe.close()
        self.process.join()
        self.process.close()

    def _hear(self) -> None:
        try:
            self.said.append(self._pipe.recv())
        except (EOFError, ConnectionResetError):
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())

    async def says(self, word: str) -> None:
        """Wait for a word."""
        await until(lambda: word in self.said, within_s=WITHIN_S, what=f"{word!r} among {self.said}")

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return what was logged under that name."""
        return [said for said in self.said if isinstance(said, dict) and said["event"] == event]

    def stop(self) -> None:
        """Hold it: it notices nothing."""
        os.kill(self.process.pid or 0, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on where it was."""
        os.kill(self.process.pid or 0, signal.SIGCONT)

    def tell(self, word: str) -> None:
        """Say something to it."""
        self._pipe.send(word)

    async def end(self) -> None:
        """Ask it to end in order, and wait for that."""
        self._pipe.send("end")
        await self._gone()
        assert self.process.exitcode == 0, f"ended with {self.process.exitcode}: {self.said}"

    async def _gone(self) -> None:
        await until(lambda: self.process.exitcode is not None, within_s=WITHIN_S, what=f"the end after {self.said}")


class Orders:
    """What a child is told; the end also when whoever started it has gone."""

    def __init__(self, pipe: Connection) -> None:
        self.go, self.over = asyncio.Event(), asyncio.Event()
        asyncio.get_running_loop().add_reader(pipe.fileno(), self._hear, pipe)

    def _hear(self, pipe: Connection) -> None:
        with suppress(EOFError, ConnectionResetError):
            if pipe.recv() == "go":
                self.go.set()
                return
        asyncio.get_running_loop().remove_reader(pipe.fileno())
        self.over.set()


def _main(pipe: Connection, work: Callable[..., Awaitable[None]], args: tuple[Any, ...]) -> None:
    def tell(_logger: Any, _level: str, event: Mapping[str, Any]) -> str:
        pipe.send({name: str(value) for name, value in event.items()})
        raise structlog.DropEvent

    logger.use(output([structlog.contextvars.merge_contextvars, tell]))

    async def run() -> None:
        await work(pipe.send, Orders(pipe), *args)

    asyncio.run(run())


async def phase(
    say: Callable[[Any], None],
    orders: Orders,
    url: str,
    namespace: str,
    name: Phase,
    point: str = "none",
    how: signal.Signals = signal.SIGKILL,
    points: Mapping[str, Patch] = POINTS,
) -> None:
    """Run one phase, which kills or stops itself when it first reaches `point`."""
    for module, setting, value in each_setting(QUICK):
        setattr(module, setting, value)

    def fall() -> None:
        say("fallen")
        os.kill(os.getpid(), how)

    points[point](fall)
    async with running_phases(url, names=[name], namespace=namespace, patience_s=WITHIN_S):
        say("ready")
        await orders.over.wait()


async def host(
    say: Callable[[Any], None],
    orders: Orders,
    url: str,
    namespace: str,
    name: str,
) -> None:
    """Host one node whose runs say `run <attempt>`, and `over <attempt>` on `go` or `stopped <attempt>` on a stop."""
    for module, setting, value in each_setting(QUICK):
        setattr(module, setting, value)

    async def agent(job: RunRequest) -> Any:
        say(f"run {job.attempt}")
        yield f"begun by {name}, "
        try:
            await orders.go.wait()
        except asyncio.CancelledError:
            say(f"stopped {job.attempt}")
            raise
        say(f"over {job.attempt}")
        yield f"ended by {name}"

    hosted = [node(name, agent, code=0.9)]
    async with running_nodes(url, lambda: hosted, namespace=namespace, drain_timeout_s=0):
        say("ready")
        await orders.over.wait()
