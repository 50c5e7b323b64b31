"""The edges of a `loom` process: closed streams, process 1 of a container, an exit that waits for nothing."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.command import LOOM, Command, below, command
from support.logs import capture_logs
from support.streams import create_streams
from support.wait import until

from loom.bus.bus import Bus
from loom.bus.service_discovery import discover
from loom.bus.task_client import publish
from loom.runner.cli.entry import loop_factory, run_to_end
from loom.runner.settings import InvalidSetting, misspelt, warn_of_misspelt_settings
from loom.schemas.task import TaskAd

CLOSED = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-", "all": "<&- >&- 2>&-"}
PROMPT_S = 5.0
"""Far less than what would be waited for, with room for a busy machine."""


def without(streams: str, *words: str) -> tuple[str, ...]:
    return ("sh", "-c", f'exec "$@" {CLOSED[streams]}', "sh", *words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "streams",
    ["stdin", pytest.param("stdout", marks=pytest.mark.slow), pytest.param("stderr", marks=pytest.mark.slow), "all"],
)
async def test_closed_standard_streams_are_as_good_as_dev_null(
    streams: str, tmp_path: Path, nats_url: str, namespace: str
) -> None:
    where = {"NATS_URL": nats_url, "LOOM_NAMESPACE": namespace}
    await create_streams(nats_url, namespace)
    async with (
        Bus(nats_url, namespace=namespace) as bus,
        command(tmp_path, *without(streams, *LOOM, "phase", "run", "match"), **where) as phase,
    ):
        await until(lambda: discover(bus, enough=bool), what="the phase answers")
        ended = await phase.end(signal.SIGTERM)
    assert ended.code == 0
    assert "Traceback" not in ended.err


def test_closed_standard_descriptors_are_occupied_and_prints_are_dropped() -> None:
    code = (
        "import os, socket, sys\n"
        "from loom.runner.cli.process_start import open_standard_streams\n"
        "open_standard_streams()\n"
        "assert socket.socket().fileno() > 2\n"
        "print('lost'); print('lost', file=sys.stderr); assert sys.stdin.read() == ''\n"
        "assert os.get_inheritable(0) and os.get_inheritable(1) and os.get_inheritable(2)\n"
        "os._exit(7)\n"
    )
    ran = subprocess.run(without("all", sys.executable, "-c", code), timeout=30, check=False)
    assert ran.returncode == 7


# -- process 1


def _may_unshare() -> bool:
    words = ["unshare", "--fork", "--pid", "--mount-proc", "true"]
    try:
        return subprocess.run(words, capture_output=True, check=False, timeout=10).returncode == 0
    except OSError:
        return False


CONTAINER = ("unshare", "--fork", "--pid", "--mount-proc", "--kill-child")
in_container = pytest.mark.skipif(not _may_unshare(), reason="needs the right to make process namespaces")


def first_process(container: Command) -> int:
    """Return the host's process id of process 1 of a container."""
    [pid] = [own for own, args in below(container.process.pid).items() if "--mount-proc" not in args][:1]
    return pid


@in_container
async def test_process_1_obeys_sigterm_while_it_still_imports(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(
        "import pathlib, time\npathlib.Path(__file__).with_name('importing').touch()\ntime.sleep(60)\n"
    )
    async with command(tmp_path, *CONTAINER, *LOOM, "phase", "run", "sense", PYTHONPATH=str(tmp_path)) as container:
        await until((tmp_path / "importing").exists, what="the imports have begun")
        os.kill(first_process(container), signal.SIGTERM)
        async with asyncio.timeout(PROMPT_S):
            assert await container.process.wait() == 128 + signal.SIGTERM


@pytest.mark.slow
@in_container
async def test_process_1_drains_and_ends_with_the_code_of_the_command(
    tmp_path: Path, nats_url: str, namespace: str
) -> None:
    where = {"NATS_URL": nats_url, "LOOM_NAMESPACE": namespace}
    await create_streams(nats_url, namespace)
    async with command(tmp_path, *CONTAINER, *LOOM, "phase", "run", "match", **where) as container:
        await container.wait_for_output("match on nats")
        os.kill(first_process(container), signal.SIGTERM)
        async with asyncio.timeout(PROMPT_S):
            assert await container.process.wait() == 0
        assert "phases_drained" in container.err
    async with command(tmp_path, *CONTAINER, *LOOM, "doctor", NATS_URL="nats://127.0.0.1:1") as container:
        assert (await container.end()).code == 3


@pytest.mark.slow
@in_container
async def test_orphans_of_agents_do_not_stay_zombies_under_process_1(
    tmp_path: Path, nats_url: str, namespace: str
) -> None:
    (tmp_path / "orphans.py").write_text(
        "import subprocess\n"
        "from loom.types import AgentNode, CapabilityProfile\n"
        "def leave(description: str) -> str:\n"
        "    for _ in range(10):\n"
        "        subprocess.run(['sh', '-c', 'sleep 0.1 & exit 0'])\n"
        "    return subprocess.run(['sh', '-c', 'exit 5']).returncode.__str__()\n"
        "nodes = [AgentNode(id='o', capabilities=CapabilityProfile(scores={'t': 0.9}), agent=leave)]\n"
    )
    where = {"NATS_URL": nats_url, "LOOM_NAMESPACE": namespace}

    def left(pid: int) -> list[str]:
        return [args for args in below(pid).values() if "sleep" in args or "defunct" in args]

    async with (
        command(tmp_path, *LOOM, "up", **where) as up,
        command(tmp_path, *CONTAINER, *LOOM, "host", "run", str(tmp_path / "orphans.py"), **where) as container,
        Bus(nats_url, namespace=namespace) as bus,
    ):
        await up.wait_for_output("loom is up on")
        await container.wait_for_output("o on nats")
        handle = await publish(bus, TaskAd(description="x", domain="t"), deltas=False)
        assert await handle.content(20) == "5"  # a child of the agent's own is its own to wait for
        await until(lambda: not left(container.process.pid), within_s=5, what="all orphans are gone")


# -- the end


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "auto"])
async def test_a_process_with_a_slow_lookup_of_its_servers_name_ends_at_once(loop: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import socket, time\nsocket.getaddrinfo = lambda *_, **__: time.sleep(60)\n"
    )
    where = {"NATS_URL": "nats://slow.example", "PYTHONPATH": str(tmp_path), "LOOM_EVENT_LOOP": loop}
    async with command(tmp_path, *LOOM, "phase", "run", "sense", **where) as phase:
        await phase.wait_for_output("connecting")
        began = time.monotonic()
        assert (await phase.end(signal.SIGTERM)).code == 0
    assert time.monotonic() - began < PROMPT_S


@pytest.mark.slow
async def test_a_process_ends_after_its_drain_despite_a_running_thread(
    tmp_path: Path, nats_url: str, namespace: str
) -> None:
    (tmp_path / "busy.py").write_text(
        "import asyncio, atexit, pathlib, threading, time\n"
        "from loom.types import AgentNode, CapabilityProfile\n"
        "pathlib.Path(__file__).with_name('busy.done').unlink(missing_ok=True)\n"
        "atexit.register(pathlib.Path(__file__).with_name('busy.done').touch)\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "async def work(description: str) -> str: return 'x'\n"
        "nodes = [AgentNode(id='busy', capabilities=CapabilityProfile(scores={'t': 0.9}), agent=work)]\n"
    )
    where = {"NATS_URL": nats_url, "LOOM_NAMESPACE": namespace}
    async with command(tmp_path, *LOOM, "host", "run", str(tmp_path / "busy.py"), **where) as node:
        await node.wait_for_output("busy on nats")
        began = time.monotonic()
        assert (await node.end(signal.SIGTERM)).code == 0
    assert time.monotonic() - began < PROMPT_S
    assert (tmp_path / "busy.done").exists()  # what the program wants done at its end is done


@pytest.mark.slow
def test_a_thread_of_the_executor_does_not_hold_up_the_end_of_the_work() -> None:
    async def work() -> str:
        asyncio.get_running_loop().run_in_executor(None, time.sleep, 20)
        await asyncio.sleep(0.05)
        return "done"

    began = time.monotonic()
    assert run_to_end(work()) == "done"
    assert time.monotonic() - began < PROMPT_S


# -- settings of the process


def test_the_event_loop_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    async def running() -> str:
        return type(asyncio.get_running_loop()).__module__.partition(".")[0]

    uvloop = pytest.importorskip("uvloop")
    for wanted, module in (("asyncio", "asyncio"), ("uvloop", "uvloop"), ("auto", "uvloop")):
        monkeypatch.setenv("LOOM_EVENT_LOOP", wanted)
        assert run_to_end(running()) == module
    assert loop_factory("uvloop") is uvloop.new_event_loop


def test_a_loop_that_is_not_installed_is_refused_and_auto_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert loop_factory("auto") is asyncio.new_event_loop
    monkeypatch.setenv("LOOM_EVENT_LOOP", "uvloop")
    with pytest.raises(InvalidSetting, match="uvloop is not installed"):
        run_to_end(asyncio.sleep(0))


def test_a_misspelt_setting_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOM_LOGLEVEL", "debug")
    assert "LOOM_LOGLEVEL" in misspelt()
    with capture_logs() as logs:
        warn_of_misspelt_settings()
        warn_of_misspelt_settings()
    warnings = [entry for entry in logs if entry["variable"] == "LOOM_LOGLEVEL"]
    assert [(entry["event"], entry["hint"]) for entry in warnings] == [("unknown_setting", "is LOOM_LOG_LEVEL meant?")]
