"""Phases and node hosts in child processes that are killed at a named point or stopped for a while.

A fork server imports everything once, so that each process starts in a few milliseconds.
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

from loom.agents.host.timings import HostTimings
from loom.bus.bus import Bus
from loom.bus.bus import _buses as buses
from loom.bus.hops.hop_loop import HopLoop
from loom.bus.logs import logger
from loom.bus.natsio.connection import Connection as BusConnection
from loom.bus.natsio.kv import Bucket
from loom.bus.natsio.publishing import PubAckFuture
from loom.bus.subjects import Parsed, Subjects
from loom.phases.scale.division import Division
from loom.phases.sense.client_api import ClientApi
from loom.runner.services import running_nodes, running_phases
from loom.runner.timings import ServiceTimings
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
}
"""Settings with which another replica takes over within about a second."""
SHORT_HEARTBEAT = ServiceTimings(host=HostTimings(heartbeat_s=0.25))


def each_setting(values: Mapping[str, float]) -> list[tuple[Any, str, float]]:
    """Return module, attribute and value of each setting."""
    split = [(*name.rpartition("."), value) for name, value in values.items()]
    return [(importlib.import_module(module), name, value) for module, _, name, value in split]


# -- points

Patch = Callable[[Callable[[], None]], None]
"""Installs a callback that runs the first time a point is reached."""


def before(owner: type, method: str, when: Callable[..., bool] = lambda *_: True) -> Patch:
    """Crash instead of calling a method."""
    return _replace(owner, method, when, call=False)


def after(owner: type, method: str, when: Callable[..., bool] = lambda *_: True) -> Patch:
    """Crash once a method has returned and the server has received what it sent."""
    return _replace(owner, method, when, call=True)


def sent(owner: type, method: str, when: Callable[..., bool] = lambda *_: True) -> Patch:
    """Crash instead of calling a method, once the server has received what was sent before."""
    return _replace(owner, method, when, call=False, flush=True)


def stored(*families: str) -> Patch:
    """Crash once the server has stored a message, before its acknowledgement is read."""
    return sent(PubAckFuture, "ack", lambda future: _on(*families)(future, future.subject))


def _replace(owner: type, method: str, when: Callable[..., bool], *, call: bool, flush: bool = False) -> Patch:
    original: Callable[..., Awaitable[Any]] = getattr(owner, method)

    def patch(crash: Callable[[], None]) -> None:
        async def crashing(self: Any, *args: Any, **options: Any) -> Any:
            if not when(self, *args):
                return await original(self, *args, **options)
            setattr(owner, method, original)
            if not call:
                if flush:
                    await bus_of(self).requests.flush()
                crash()
            result = await original(self, *args, **options)
            if call:
                await bus_of(self).requests.flush()
                crash()
            return result

        setattr(owner, method, crashing)

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
        parsed = _parse(subject)
        return parsed is not None and parsed.family in families

    return addressed


def _in(bucket: str) -> Callable[..., bool]:
    return lambda self, *_: self._prefix.endswith(f"_{bucket}.")


def _becomes(state: str) -> Callable[..., bool]:
    return lambda self, _key, value, *_: self._prefix.endswith("_plans.") and value.state == state


def begins_a_task(future: PubAckFuture) -> bool:
    """Return whether a message goes to SENSE as a subtask or a delegated task does."""
    parsed = _parse(future.subject)
    return parsed is not None and parsed.tokens.get("phase") == "sense"


def _parse(subject: str) -> Parsed | None:
    """Return the parts of a subject; None for one outside a namespace: of the server, of a bucket, or an inbox."""
    return None if subject.startswith(("$", "_")) else Subjects(subject.partition(".")[0]).parse(subject)


def _at(checkpoint: str) -> Callable[..., bool]:
    return lambda _loop, name: name == checkpoint


POINTS: dict[str, Patch] = {
    "fetched": before(HopLoop, "_checkpoint", _at("fetched")),
    "handled, unpublished": before(HopLoop, "_checkpoint", _at("handled")),
    "published, unconfirmed": stored("task", "later"),
    "confirmed, unacked": before(HopLoop, "_checkpoint", _at("before ack")),
    "acked": sent(HopLoop, "_checkpoint", _at("acked")),
    "bids called for": after(BusConnection, "publish", _on("auction")),
    "recorded": after(Bucket, "update", _in("records")),
    "relayed": after(BusConnection, "publish", _on("delta")),
    "rewarded": sent(BusConnection, "publish", _on("result")),
    "reward stored": stored("reward"),
    "announced": after(BusConnection, "publish", _on("result")),
    "learned": after(Bucket, "update", _in("nodes")),
    "submission stored": stored("intake"),
    "cancel sent to evaluate": after(ClientApi, "_publish_to_evaluate"),
    "cancel recorded": after(ClientApi, "_cancel_task"),
    "plan stored": after(Bucket, "create", _in("plans")),
    "timer set": stored("later"),
    "subtask stored": sent(PubAckFuture, "ack", begins_a_task),
    "plan recorded": after(Bucket, "update", _becomes("running")),
    "plan joining": after(Bucket, "update", _becomes("joining")),
    "timer removed": after(Division, "_remove_timer"),
    "plan done": after(Bucket, "update", _becomes("done")),
    "subtask cancelled": after(BusConnection, "publish", _on("cancel")),
    "none": lambda _crash: None,
}
"""Name of a crash point -> the patch that installs it."""


# -- processes


class CrashProcess:
    """A child process that runs `work` and reports over a pipe; leaving the context kills it.

    Args:
        work: An async function of `send`, `commands` and `args`. It sends "ready" once it works, and returns after
            `commands.end`.
    """

    def __init__(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        self._pipe, self._child_pipe = FORKS.Pipe()
        self.process = FORKS.Process(target=_main, args=(self._child_pipe, work, args), daemon=True)
        self.received: list[Any] = []
        """Words, and log events as dicts, oldest first."""

    async def __aenter__(self) -> Self:
        self.process.start()
        self._child_pipe.close()
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._receive)
        await self.wait_for("ready")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        await self._exited()
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        self._pipe.close()
        self.process.join()
        self.process.close()

    def _receive(self) -> None:
        try:
            self.received.append(self._pipe.recv())
        except (EOFError, ConnectionResetError):
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())

    async def wait_for(self, word: str) -> None:
        """Wait until the process has sent a word."""
        await until(lambda: word in self.received, within_s=WITHIN_S, what=f"{word!r} among {self.received}")

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the log events of that name."""
        return [item for item in self.received if isinstance(item, dict) and item["event"] == event]

    def pause(self) -> None:
        """Stop the process with SIGSTOP."""
        os.kill(self.process.pid or 0, signal.SIGSTOP)

    def resume(self) -> None:
        """Continue the process with SIGCONT."""
        os.kill(self.process.pid or 0, signal.SIGCONT)

    def send(self, word: str) -> None:
        """Send a command to the process."""
        self._pipe.send(word)

    async def end(self) -> None:
        """Have the process end in order, and wait until it has exited."""
        self._pipe.send("end")
        await self._exited()
        assert self.process.exitcode == 0, f"exited with {self.process.exitcode}: {self.received}"

    async def _exited(self) -> None:
        what = f"the exit after {self.received}"
        await until(lambda: self.process.exitcode is not None, within_s=WITHIN_S, what=what)


class ParentCommands:
    """The commands "go" and "end" of the parent as events; a closed pipe counts as "end"."""

    def __init__(self, pipe: Connection) -> None:
        self.go, self.end = asyncio.Event(), asyncio.Event()
        asyncio.get_running_loop().add_reader(pipe.fileno(), self._receive, pipe)

    def _receive(self, pipe: Connection) -> None:
        with suppress(EOFError, ConnectionResetError):
            if pipe.recv() == "go":
                self.go.set()
                return
        asyncio.get_running_loop().remove_reader(pipe.fileno())
        self.end.set()


def _main(pipe: Connection, work: Callable[..., Awaitable[None]], args: tuple[Any, ...]) -> None:
    def send_log_event(_logger: Any, _level: str, event: Mapping[str, Any]) -> str:
        pipe.send({name: str(value) for name, value in event.items()})
        raise structlog.DropEvent

    logger.use(output([structlog.contextvars.merge_contextvars, send_log_event]))

    async def run() -> None:
        await work(pipe.send, ParentCommands(pipe), *args)

    asyncio.run(run())


async def phase(
    send: Callable[[Any], None],
    commands: ParentCommands,
    url: str,
    namespace: str,
    name: Phase,
    point: str = "none",
    how: signal.Signals = signal.SIGKILL,
    points: Mapping[str, Patch] = POINTS,
) -> None:
    """Run one phase, which kills or stops its process when it first reaches `point`."""
    for module, setting, value in each_setting(QUICK):
        setattr(module, setting, value)

    def crash() -> None:
        send("crashing")
        os.kill(os.getpid(), how)

    points[point](crash)
    async with running_phases(url, names=[name], namespace=namespace, patience_s=WITHIN_S):
        send("ready")
        await commands.end.wait()


async def host(
    send: Callable[[Any], None],
    commands: ParentCommands,
    url: str,
    namespace: str,
    name: str,
) -> None:
    """Host one node whose runs send `run <attempt>`, then `over <attempt>` on `go` or `stopped <attempt>` on a stop."""
    for module, setting, value in each_setting(QUICK):
        setattr(module, setting, value)

    async def agent(job: RunRequest) -> Any:
        send(f"run {job.attempt}")
        yield f"begun by {name}, "
        try:
            await commands.go.wait()
        except asyncio.CancelledError:
            send(f"stopped {job.attempt}")
            raise
        send(f"over {job.attempt}")
        yield f"ended by {name}"

    hosted = [node(name, agent, code=0.9)]
    async with running_nodes(url, lambda: hosted, namespace=namespace, drain_timeout_s=0, timings=SHORT_HEARTBEAT):
        send("ready")
        await commands.end.wait()
