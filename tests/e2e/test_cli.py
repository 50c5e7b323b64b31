"""The command line, run in processes as by people and supervisors."""

import asyncio
import json
import os
import pty
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
from support.command import LOOM, Command, Ended
from support.wait import until

from loom.bus.bus import Bus
from loom.bus.records import records
from loom.bus.task_client import status
from loom.runner import log_output
from loom.runner.cli.app import main
from loom.runner.server.nats_server import NatsServer
from loom.runner.services import running_nodes
from loom.runner.session import check_phases
from loom.schemas.base import decode
from loom.schemas.errors import UnknownTask
from loom.schemas.task import TaskResult
from loom.types import AgentNode, CapabilityProfile

WITHIN_S = 20

AGENTS = """
from loom.types import AgentNode, CapabilityProfile

def shout(description: str) -> str:
    return description.upper()

async def spell(description: str):
    for word in description.split():
        yield word + " "

def broken(description: str) -> str:
    raise ValueError("the file is empty")

nodes = [
    AgentNode(id="shouter", capabilities=CapabilityProfile(scores={"loud": 0.9, "quiet": 0.1}), agent=shout),
    AgentNode(id="speller", capabilities=CapabilityProfile(scores={"quiet": 0.9, "loud": 0.1}), agent=spell),
    AgentNode(id="broken", capabilities=CapabilityProfile(scores={"loud": 0.01, "quiet": 0.01}), agent=broken),
]
"""
TASKS = """
{"task_id": "one", "domain": "loud", "description": "hello"}
{"task_id": "two", "domain": "quiet", "description": "good night"}
{"task_id": "three", "node_id": "broken", "description": "break"}
"""


Start = Callable[..., Awaitable[Command]]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the settings of the machine from the environment."""
    for name in list(os.environ):
        if name.startswith(("LOOM_", "NATS_", "OPENAI_")) or name in {"COLUMNS", "NO_COLOR", "FORCE_COLOR"}:
            monkeypatch.delenv(name)


@pytest.fixture
async def start(environment: None, tmp_path: Path) -> AsyncIterator[Start]:
    """A function that starts `loom` in a new folder with agents.py and tasks.jsonl."""
    (tmp_path / "agents.py").write_text(AGENTS)
    (tmp_path / "tasks.jsonl").write_text(TASKS)
    started: list[asyncio.subprocess.Process] = []

    numbers = count()

    async def start_one(*words: str, **env: str) -> Command:
        number = next(numbers)
        out, err = tmp_path / f"{number}.out", tmp_path / f"{number}.err"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *LOOM, *words, stdout=stdout, stderr=stderr, cwd=tmp_path, env={**os.environ, **env}
            )
        started.append(process)
        return Command(process, out, err)

    yield start_one
    for process in started:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def loom(start: Start, *words: str, **env: str) -> Ended:
    return await (await start(*words, **env)).end()


@asynccontextmanager
async def hosting(url: str, namespace: str, **agents: object) -> AsyncIterator[None]:
    nodes = [AgentNode(id=name, agent=agent, capabilities=CapabilityProfile()) for name, agent in agents.items()]
    async with running_nodes(url, lambda: nodes, namespace=namespace):
        yield


# -- loom run


async def test_run_starts_server_and_phases_and_reports_in_order(start: Start, tmp_path: Path) -> None:
    ended = await loom(start, "run", "tasks.jsonl", "--agents", "agents.py", NO_COLOR="1")

    results = [decode(line, TaskResult) for line in (tmp_path / "results.jsonl").read_bytes().splitlines()]
    assert [result.task_id for result in results] == ["one", "two", "three"]
    assert [result.content.strip() for result in results[:2]] == ["HELLO", "good night"]
    assert results[2].error is not None
    assert results[2].error.code == "agent_failed"
    assert ended.code == 1  # a task failed
    assert "\x1b" not in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "one  execute  on shouter\n" in ended.out
    progress, tables = ended.out.split("Results", 1)
    assert all(f"one  {phase}" in progress for phase in ("sense", "match", "execute", "evaluate", "succeeded"))
    assert re.search(r"one +loud +shouter +1 +\d\.\d +HELLO", tables)
    assert re.search(r"three +general .* agent_failed: ", tables)
    assert re.search(r"one +shouter +0\.\d\d +\w+ 0\.\d\d \+1 +1\.00 +0\.85", tables)  # award, runner-up, reward
    assert re.search(r"speller +quiet +1\.00 +1 *\n", tables)  # what was learned
    assert "2 of 3 succeeded" in tables


@pytest.mark.slow
async def test_run_uses_the_cluster_of_nats_url_and_pipes_its_results(
    start: Start, on_bus: tuple[str, str], phases: Bus, tmp_path: Path
) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"task_id": "one", "domain": "loud", "description": "hello"}')

    async with hosting(*on_bus, elsewhere=lambda description: f"{description} from elsewhere"):
        ended = await loom(start, "run", "tasks.jsonl", "--out", "-")

    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["content"] == "hello from elsewhere"
    assert "1 of 1 succeeded" in ended.err


@pytest.mark.slow
async def test_run_without_phases_names_the_missing_phases_and_the_remedy(
    start: Start, on_bus: tuple[str, str]
) -> None:
    ended = await loom(start, "run", "tasks.jsonl", "--agents", "agents.py")

    assert (ended.code, ended.err) == (3, 'bus_unavailable: no phases answer; run "loom up"\n')


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_run_keeps_its_results(start: Start, tmp_path: Path, by: signal.Signals) -> None:
    (tmp_path / "agents.py").write_text(
        AGENTS + "import asyncio\nnodes[2].agent = lambda description: asyncio.sleep(600)"
    )
    run = await start("run", "tasks.jsonl", "--agents", "agents.py")
    await run.wait_for_output("two  succeeded")
    await run.wait_for_output("one  succeeded")
    await run.wait_for_output("three  execute")

    ended = await run.end(by)

    assert ended.code == 128 + by
    assert "Traceback" not in ended.err
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
async def test_a_closed_pipe_of_a_reader_does_not_end_the_run(start: Start, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        process = await asyncio.create_subprocess_exec(
            *LOOM,
            "run",
            "tasks.jsonl",
            "--agents",
            "agents.py",
            cwd=tmp_path,
            stdout=writer,
            stderr=asyncio.subprocess.PIPE,
        )
    finally:
        os.close(writer)
    _, errors = await process.communicate()

    assert b"Traceback" not in errors
    assert b"SystemExit" not in errors
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3


# -- loom up, phase, node, tap


@pytest.mark.slow
async def test_a_cluster_of_processes_works_is_watched_and_stops(start: Start, tmp_path: Path) -> None:
    up = await start("up", "--port", "0", LOOM_STORE=str(tmp_path / "store"))
    url = re.findall(r"nats://\S+:\d+", (await up.wait_for_output("loom is up on")).err)[0]
    where = {"NATS_URL": url}
    tap, tap_json = await start("tap", **where), await start("tap", "--json", **where)
    node = await start("host", "run", "agents.py", "--slots", "2", **where)
    await node.wait_for_output("shouter, speller, broken on nats://")
    await asyncio.gather(tap.wait_for_output("listening on nats"), tap_json.wait_for_output("listening on nats"))

    printed, printed_json, failed = await asyncio.gather(
        loom(start, "submit", "hello", "--domain", "loud", "--priority", "high", **where),
        loom(start, "submit", "good night", "--domain", "quiet", "--json", **where),
        loom(start, "submit", "x", "--node", "broken", **where),
    )

    assert (printed.code, printed.out, printed.err) == (0, "HELLO\n", "")
    assert json.loads(printed_json.out)["node_id"] == "speller"
    assert (failed.code, failed.out) == (1, "")
    assert failed.err == "agent_failed: the agent raised ValueError\n"
    for last in ("succeeded on shouter", "failed, agent_failed"):
        traffic = (await tap.wait_for_output(last)).out
    for kind in ("intake", "task match", "auction", "task execute", "run", "delta", "task evaluate", "reward"):
        assert f" {kind} " in traffic
    await tap_json.wait_for_output(f"loom.result.public.{json.loads(printed_json.out)['task_id']}")
    watched = [json.loads(line) for line in tap_json.out.splitlines()]
    assert {"shouter", "speller"} <= {each["tokens"]["node_id"] for each in watched if each["family"] == "reward"}
    assert (await tap.end(signal.SIGINT)).code == 130
    assert (await node.end(signal.SIGTERM)).code == 0
    ended = await up.end(signal.SIGINT)
    assert ended.code == 0
    assert "phases_drained" in ended.err
    assert "Traceback" not in ended.err
    assert (tmp_path / "store" / "jetstream").is_dir()


@pytest.mark.slow
async def test_up_reports_a_taken_port(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = await loom(start, "up", "--port", str(port))

    assert ended.code == 3
    assert ended.err.count("\n") == 1
    assert ended.err.startswith(f"bus_unavailable: port {port} is taken")


@pytest.mark.slow
async def test_a_phase_waits_for_its_server_and_for_its_streams(start: Start, namespace: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"nats://127.0.0.1:{port}"
    phase = await start("phase", "run", "match", "sense", NATS_URL=url, LOOM_NAMESPACE=namespace)
    await phase.wait_for_output("connecting")
    server = NatsServer(port=port)
    server.start()
    try:
        await phase.wait_for_output("run `loom init`")
        assert (await loom(start, "init", NATS_URL=url, LOOM_NAMESPACE=namespace)).code == 0
        await phase.wait_for_output("sense, match on nats")
        assert phase.out == ""  # where logs are collected, every line is of one form
        lines = [json.loads(line) for line in phase.err.splitlines()]
        assert [line["message"] for line in lines if line["event"] == "ready"] == [f"sense, match on {url}"]
        async with Bus(url, namespace=namespace) as bus:
            await check_phases(bus)
        ended = await phase.end(signal.SIGTERM)
    finally:
        server.stop()

    assert ended.code == 0
    assert "phases_drained" in ended.err


# -- loom submit


@pytest.mark.slow
async def test_an_answer_is_shown_while_it_is_written_and_only_once(
    start: Start, on_bus: tuple[str, str], phases: Bus
) -> None:
    go_on = asyncio.Event()

    async def slow(description: str) -> AsyncIterator[str]:
        yield "the first half, "
        await go_on.wait()
        yield "the second half"

    async with hosting(*on_bus, slow=slow):
        ours, theirs = pty.openpty()
        os.set_blocking(ours, False)
        process = await asyncio.create_subprocess_exec(*LOOM, "submit", "x", stdin=theirs, stdout=theirs)
        shown = bytearray()

        def read(text: bytes) -> bool:
            with suppress(BlockingIOError):
                shown.extend(os.read(ours, 65536))
            return text in shown

        try:
            await until(lambda: read(b"first half"), within_s=WITHIN_S, what="the first half is shown")
            assert b"second" not in shown
            go_on.set()
            async with asyncio.timeout(WITHIN_S):
                assert await process.wait() == 0
            await until(lambda: read(b"\n"), what="the line ends")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            os.close(theirs)
            os.close(ours)

    assert shown == b"the first half, the second half\r\n"


@pytest.mark.slow
async def test_an_interrupted_submit_cancels_its_task(
    start: Start, on_bus: tuple[str, str], phases: Bus, client: Bus
) -> None:
    tasks: list[str] = []

    async def endless(job: object) -> str:
        tasks.append(job.task_id)  # type: ignore[attr-defined]
        await asyncio.sleep(600)
        return "never"

    async with hosting(*on_bus, endless=endless):
        submit = await start("submit", "x")
        await until(lambda: tasks, within_s=WITHIN_S, what="the run begins")

        ended = await submit.end(signal.SIGINT)

        record = await status(client, tasks[0])
    assert (ended.code, ended.out) == (130, "")
    assert ended.err == f"interrupted: {tasks[0]} cancelled\n"
    assert record.state == "cancelled"


@pytest.mark.slow
async def test_submit_without_wait_prints_the_id_alone(start: Start, phases: Bus, client: Bus) -> None:
    ended = await loom(start, "submit", "x", "--no-wait", "--label", "tenant=a=b", "--label", "user=")

    assert ended.code == 0
    known = await until(lambda: records(client).get(ended.out.strip()), what="the task is admitted")
    assert known.value.envelope.ad.labels == {"tenant": "a=b", "user": ""}
    with pytest.raises(UnknownTask):
        await status(client, "another")


# -- bad input


@pytest.fixture
def quietly(environment: None) -> Iterator[None]:
    """Undo the changes of commands in this process to logging."""
    yield
    log_output.reset()


@pytest.mark.usefixtures("quietly")
@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("run missing.jsonl --agents a.py", 2, "invalid_file: missing.jsonl: No such file or directory"),
        ("run good.jsonl", 2, "bad_usage: Invalid value for --agents: needed, unless NATS_URL leads to"),
        ("run good.jsonl --agents a.py --out ./good.jsonl", 2, "bad_usage: Invalid value for --out: is the file of"),
        ("run good.jsonl --agents missing.py", 2, "invalid_file: missing.py: no such file"),
        ("run bad.jsonl --agents missing.py", 2, "invalid_task: bad.jsonl, line 1, field domian: "),
        ("host run bad.py", 2, "invalid_file: bad.py, line 2: ZeroDivisionError: division by zero"),
        ("phase run sense nonsense", 2, "bad_usage: Invalid value for NAME: 'nonsense' is not one of sense, match"),
        ("submit x --priority urgent", 2, "invalid_task: priority must be one of low, normal, high, critical"),
        ("submit x --timeout -1", 2, "invalid_task: "),
        ("submit x --context {", 2, "invalid_task: context is not JSON"),
        ("submit x --context [1]", 2, "invalid_task: context must be a JSON object, such as"),
        ("submit x --node a.b.c", 2, "invalid_task: "),
        ("up --port 70000", 2, "bad_usage: Invalid value for '--port'"),
        (
            "up --host 0.0.0.0",
            2,
            "bad_usage: Invalid value for --host: 0.0.0.0 can be reached from other machines: set",
        ),
        ("up --host myself.example", 2, "bad_usage: Invalid value for --host: myself.example can be reached"),
        ("up --ephemeral --store x", 2, "bad_usage: Invalid value for --ephemeral: keeps nothing"),
        ("up --host 192.0.2.1 --insecure --ephemeral", 3, "bus_unavailable: 192.0.2.1 is not an address of this"),
        ("nonsense", 2, "bad_usage: No such command 'nonsense'"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    line: str,
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "good.jsonl").write_text('{"description": "x"}')
    (tmp_path / "bad.jsonl").write_text('{"description": "x", "domian": "y"}')
    (tmp_path / "bad.py").write_text("x = 1\nnodes = x / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["loom", *line.split()])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.usefixtures("quietly")
def test_a_bad_setting_ends_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOOM_NAMESPACE", "Not A Name")
    for words in (["up"], ["phase", "run", "sense"], ["host", "run", "x.py"], ["run", "x"], ["submit", "x"], ["tap"]):
        monkeypatch.setattr(sys, "argv", ["loom", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith("invalid_setting: LOOM_NAMESPACE: ")


@pytest.mark.slow
async def test_without_a_server_a_client_fails_soon(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"nats://user:secret@127.0.0.1:{probe.getsockname()[1]}"
    ended = await loom(start, "tap", NATS_URL=url)

    assert ended.code == 3
    assert re.fullmatch(r"bus_unavailable: no nats-server at nats://127[^\n]*\n", ended.err)
    assert "secret" not in ended.err


@pytest.mark.usefixtures("quietly")
@pytest.mark.parametrize("words", [["--version"], [], ["--help"]])
def test_the_command_introduces_itself(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["loom", *words])
    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 0
    out = capsys.readouterr().out
    if words == ["--version"]:
        assert re.fullmatch(r"loom \d+\.\d+\.\d+\n", out)
    else:
        assert all(f" {command} " in out for command in ("run", "up", "phase", "node", "submit", "tap", "host", "task"))
