"""`loom up --processes`: dead processes are restarted, and a stop leaves no process behind."""

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from support.command import LOOM, WITHIN_S, Command, alive, below, command, loom
from support.streams import create_streams
from support.wait import until

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.service_discovery import discover
from loom.runner.cli.commands import up as up_module
from loom.runner.server.nats_server import NatsServer
from loom.runner.services import running_nodes
from loom.runner.supervisor import LONGEST_S, STEADY_S, Backoff, Program, Supervisor, keep_alive
from loom.schemas.envelope import PHASES
from loom.schemas.errors import BusUnavailable
from loom.schemas.run import RunRequest
from loom.schemas.task import TaskAd
from loom.types import AgentNode, CapabilityProfile

pytestmark = pytest.mark.usefixtures("nats_url")  # skipped or failed where there is no server binary

BACK_S = 5.0
"""How soon what was killed is there again: two seconds, and some for a machine that runs tests besides."""


@given(st.lists(st.floats(min_value=0, max_value=2 * STEADY_S), min_size=1))
def test_the_pause_grows_to_its_limit_and_resets_after_a_steady_life(lives: list[float]) -> None:
    backoff = Backoff()
    before = 0.0
    for lived_s in lives:
        pause_s = backoff.after(lived_s)
        if lived_s >= STEADY_S or not before:
            assert pause_s <= 0.2
        else:
            assert pause_s == min(2 * before, LONGEST_S)
        before = pause_s


# -- any program


@asynccontextmanager
async def supervised(
    *programs: tuple[str, str], stop_s: float = 10
) -> AsyncIterator[tuple[Supervisor, list[tuple[str, str]]]]:
    """Shell scripts by name, and the lines they have printed."""
    lines: list[tuple[str, str]] = []
    supervisor = Supervisor(
        [Program(name, ("/bin/sh", "-c", script)) for name, script in programs],
        environment=dict(os.environ),
        stop_s=stop_s,
        write_line=lambda name, line: lines.append((name, line)),
    )
    async with supervisor:
        yield supervisor, lines


async def test_lines_keep_the_name_of_their_process() -> None:
    async with supervised(("one", "echo a; printf 'b\\nhalf' >&2; exec sleep 60"), ("two", "echo c; exit 3")) as (
        _,
        lines,
    ):
        await until(lambda: lines.count(("two", "c")) >= 3, what="it is started again and again")
        assert [line for name, line in lines if name == "one"] == ["a", "b"]

    assert ("one", "half") in lines  # its last word, without an end of line


async def test_a_process_that_ignores_sigterm_is_killed() -> None:
    async with supervised(("deaf", "trap '' TERM; echo $$; while :; do sleep 0.05; done"), stop_s=0.2) as (_, lines):
        await until(lambda: lines, what="it runs")
        pid = int(lines[0][1])

    assert not alive(pid)


@pytest.mark.slow
async def test_nothing_outlives_a_supervisor_that_is_killed(tmp_path: Path, nats_url: str, namespace: str) -> None:
    script = f"""
import asyncio, os
from loom.runner.supervisor import Program, Supervisor

def print_line(name, line):
    print(name, line, flush=True)

async def main():
    words = {(*LOOM, "phase", "run", "--supervised", "pipe", "scale")!r}
    programs = [Program(name, words) for name in ("one", "two")]
    async with Supervisor(programs, environment=dict(os.environ), stop_s=5, write_line=print_line):
        await asyncio.Event().wait()

asyncio.run(main())
"""
    await create_streams(nats_url, namespace)
    async with command(tmp_path, sys.executable, "-c", script, NATS_URL=nats_url, LOOM_NAMESPACE=namespace) as parent:
        await until(lambda: parent.out.count('"ready"') == 2, within_s=WITHIN_S, what="both are ready")
        children = below(parent.process.pid)
        await parent.end(signal.SIGKILL)

        assert len(children) == 2
        await until(lambda: not any(map(alive, children)), within_s=10, what="the children have ended")


def restarted(server: NatsServer, before: int) -> bool:
    try:
        return server.pid not in {0, before}
    except BusUnavailable:  # between the two
        return False


@pytest.mark.slow
async def test_a_killed_server_is_restarted_with_its_port_and_store(tmp_path: Path) -> None:
    server = NatsServer(tmp_path / "store")
    server.start()
    url = server.url
    keeping = asyncio.create_task(keep_alive(server))
    try:
        for victim in ("server", "guard"):
            before = server.pid
            async with Bus(url) as bus:
                await bus.jetstream.api("STREAM.CREATE.S", {"name": "S", "subjects": ["s"], "storage": "file"})
                os.kill(before if victim == "server" else server._guard._process.pid, signal.SIGKILL)
                await until(lambda: restarted(server, before), within_s=BACK_S, what="it is back")  # noqa: B023 - awaited here
                assert server.url == url
                assert (await bus.jetstream.api("STREAM.INFO.S"))["config"]["subjects"] == ["s"]
            await until(lambda: not alive(before), what="the old one is gone")  # noqa: B023 - awaited here
    finally:
        keeping.cancel()
        last = server.pid
        server.stop()
    assert not alive(last)


def test_a_server_whose_guard_was_killed_is_stopped_all_the_same() -> None:
    server = NatsServer()
    server.start()
    pid = server.pid
    assert not server.ended
    os.kill(server._guard._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
    server.stop()

    assert not alive(pid)
    assert not server.ended  # it was stopped


# -- the whole


@pytest.mark.slow
async def test_replicas_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    ended = await loom(tmp_path, "up", "--processes", "--replicas", "pilot=2")

    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert ended.err.startswith("bad_usage: Invalid value for --replicas: 'pilot=2' is not a phase and 1 to ")
    for text in ("execute", "execute=", "execute=0", "execute=65", "execute=two", "=2", ""):
        with pytest.raises(typer.BadParameter):
            up_module._counts([text])
    assert up_module._counts(["execute=3"]) == {**dict.fromkeys(PHASES, 1), "execute": 3}


class Cluster:
    """`loom up --processes` and a client of it."""

    def __init__(self, up: Command, bus: Bus) -> None:
        self.up = up
        self.bus = bus
        self.go_on = asyncio.Event()

    async def count(self) -> Counter[str]:
        return Counter(each.metadata["service"] for each in await discover(self.bus, within_s=0.2))

    def victims(self) -> dict[int, str]:
        """Return the command lines of all processes by id, without the shells that guard the server."""
        return below(self.up.process.pid)

    async def task(self, task_id: str) -> None:
        """Submit a task that runs until `go_on`, and return when it runs."""
        ad = TaskAd(task_id=task_id, domain="any", description="wait", wait=False)
        await task_client.request(self.bus, self.bus.subjects.submit, ad)
        await self.reaches(task_id, "running")

    async def reaches(self, task_id: str, state: str, within_s: float = 20) -> None:
        async def reached() -> bool:
            try:
                record = await task_client.record(self.bus, task_id)
            except BusUnavailable:
                return False
            return record is not None and record.state == state and bool(record.claim.host_id)

        await until(reached, within_s=within_s, what=f"{task_id} is {state}")

    async def kill(self, pid: int) -> None:
        """Kill a process; return when all processes run again, in time."""
        before = set(self.victims())
        with suppress(ProcessLookupError):  # the server and its guard go together
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        await until(lambda: not alive(pid), what="it is dead")

        async def back() -> bool:
            return len(self.victims()) >= len(before) and await self.count() >= WHOLE

        await until(back, within_s=10, what="all are back")
        assert time.monotonic() - killed < BACK_S


WHOLE = Counter(PHASES) + Counter(["execute"])


@asynccontextmanager
async def cluster(folder: Path, store: str) -> AsyncIterator[Cluster]:
    words = ("up", "--processes", "--replicas", "execute=2", "--port", "0")
    async with command(folder, *LOOM, *words, LOOM_STORE=store) as up:
        await up.wait_for_output("loom is up on")
        url = re.findall(r"nats://\S+:\d+", up.err)[0]
        async with Bus(url) as bus:
            running = Cluster(up, bus)

            async def work(job: RunRequest) -> str:
                await running.go_on.wait()
                return f"{job.task_id} done"

            node = AgentNode(id="n", agent=work, capabilities=CapabilityProfile())
            async with running_nodes(url, lambda: [node]):
                yield running
                processes = running.victims()
                ended = await up.end(signal.SIGTERM)
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert "processes_killed" not in ended.err
    assert not any(map(alive, processes))


@pytest.mark.slow
async def test_a_cluster_of_processes_heals_and_stops(tmp_path: Path) -> None:
    async with cluster(tmp_path, str(tmp_path / "store")) as running:
        assert await running.count() == WHOLE + Counter(["node"])
        await running.task("t1")
        pids = running.victims()
        await running.kill(next(pid for pid, words in pids.items() if words.endswith("pipe evaluate")))
        await running.kill(next(pid for pid, words in pids.items() if words.split()[0].endswith("nats-server")))
        running.go_on.set()
        await running.reaches("t1", "succeeded")

        stderr = running.up.err
        events = [json.loads(line) for line in stderr.splitlines()]
        assert {"execute-2", "evaluate"} <= {
            line.get("process") for line in events if line["event"] == "phases_started"
        }
        assert running.up.out == ""


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_any_process_may_be_killed_while_tasks_run(tmp_path: Path) -> None:
    async with cluster(tmp_path, str(tmp_path / "store")) as running:
        for number, pid in enumerate(list(running.victims())):
            running.go_on.clear()
            await running.task(f"t{number}")
            if alive(pid):  # the server and its guard go together
                await running.kill(pid)
            running.go_on.set()
            await running.reaches(f"t{number}", "succeeded", within_s=60)
