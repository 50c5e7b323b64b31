"""Submitters in separate accounts: a bare client needs no name, and reaches nothing of other submitters."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.aio.client import Client
from support.accounts import PASSWORD, account, accounts, check_command
from support.command import command
from support.configured import configured_server
from support.javascript import javascript_folder
from support.nodes import node
from support.services import running_phases
from support.wait import until

from loom import Runtime
from loom.bus.bus import Bus
from loom.runner.services import running_nodes
from loom.schemas.config import ClusterConfig
from loom.schemas.events import TextDelta
from loom.schemas.run import RunRequest

EXAMPLES = Path(__file__).parents[2] / "examples" / "wire"
LATE_S = 3.5
"""A server's first threshold for answers between accounts, 2 s or so, is over by then."""


async def work(job: RunRequest) -> AsyncIterator[TextDelta]:
    """An agent that writes in two pieces, and is late on request of the description."""
    yield TextDelta(text="done: ")
    if "late" in job.description:
        await asyncio.sleep(LATE_S)
    if "endless" in job.description:
        await asyncio.Event().wait()
    yield TextDelta(text=job.description)


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    """A server with the accounts LOOM, TEAM_A and TEAM_B, and a cluster in LOOM."""
    conf = accounts(f"{tmp_path}/js", account("TEAM_A"), account("TEAM_B"))
    async with configured_server(tmp_path, conf) as address:
        url = url_of("loom", address)
        async with cluster(url):
            yield address


@asynccontextmanager
async def cluster(url: str) -> AsyncIterator[None]:
    """Run the phases and a node; the exit does not wait for its runs."""
    config = ClusterConfig(drain_timeout_s=0.1)
    nodes = [node("worker", work, code=0.9)]
    async with running_phases(url, config=config), running_nodes(url, lambda: nodes, drain_timeout_s=0.1):
        yield


def url_of(user: str, address: str) -> str:
    return f"nats://{user}:{PASSWORD}@{address}"


class BareClient:
    """A client on nats-py and JSON alone."""

    def __init__(self, nc: Client) -> None:
        self.nc = nc
        self.messages: list[tuple[str, Any]] = []
        self.errors: list[str] = []

    async def listen(self, *subjects: str) -> None:
        async def on_message(msg: Any) -> None:
            self.messages.append((msg.subject, json.loads(msg.data) if msg.data else None))

        for subject in subjects:
            await self.nc.subscribe(subject, cb=on_message)
        await self.nc.flush()

    async def ask(self, subject: str, body: Any = None) -> Any:
        payload = b"" if body is None else json.dumps(body).encode()
        return json.loads((await self.nc.request(subject, payload, timeout=20)).data)


async def connected(address: str, user: str, stack: list[Client]) -> BareClient:
    errors: list[str] = []

    async def note(error: Exception) -> None:
        errors.append(str(error))

    nc = await nats.connect(url_of(user, address), error_cb=note, allow_reconnect=False)
    stack.append(nc)
    client = BareClient(nc)
    client.errors = errors
    return client


@pytest.fixture
async def clients(address: str) -> AsyncIterator[tuple[BareClient, BareClient, BareClient]]:
    """Bare clients: TEAM_A with least permissions, TEAM_B free within its account, and one in LOOM."""
    opened: list[Client] = []
    try:
        yield (
            await connected(address, "TEAM_A", opened),
            await connected(address, "TEAM_B-free", opened),
            await connected(address, "loom", opened),
        )
    finally:
        for nc in opened:
            await nc.close()


Clients = tuple[BareClient, BareClient, BareClient]


@pytest.mark.slow  # the answer is late on purpose
async def test_a_bare_client_in_an_account_gets_late_answers_deltas_and_results(clients: Clients) -> None:
    ann, other, operator = clients
    for one in (ann, other):
        await one.listen("loom.result.public.*", "loom.delta.public.*")
    await operator.listen("loom.result.*.*", "loom.delta.*.*", "loom.intake.>")
    result = await ann.ask("loom.submit", {"task_id": "t1", "domain": "code", "description": "late"})
    assert (result["state"], result["content"]) == ("succeeded", "done: late")
    await until(
        lambda: len([1 for subject, _ in ann.messages if ".result." in subject]) == 1, what="the result has come"
    )
    texts = [body["event"].get("text", "") for subject, body in ann.messages if subject == "loom.delta.public.t1"]
    assert "".join(texts) == "done: late"
    assert ("loom.result.public.t1", result) in ann.messages
    assert not ann.errors
    assert not other.messages
    assert {subject.split(".")[2] for subject, _ in operator.messages} == {"TEAM_A"}
    full = await ann.ask("loom.status.t1", {"full": True})
    assert full["record"]["envelope"]["submitter"] == "TEAM_A"
    assert "reply_to" not in full["record"]


async def test_another_account_reaches_neither_a_task_nor_its_id(clients: Clients) -> None:
    ann, other, operator = clients
    ad = {"task_id": "t1", "domain": "code", "description": "endless"}
    assert (await ann.ask("loom.submit", {**ad, "wait": False}))["state"] == "accepted"

    async def running() -> bool:
        return bool((await ann.ask("loom.status.t1")).get("state") == "running")

    await until(running, what="the task runs")
    for family in ("status", "cancel"):
        assert (await other.ask(f"loom.{family}.t1"))["code"] == "unknown_task"
    refused = await other.ask("loom.submit", ad)
    assert (refused["code"], refused["field"]) == ("invalid_task", "task_id")
    await other.listen("loom.result.public.t1", "loom.delta.public.t1")
    body = {"ad": ad, "submission": "s1"}
    ack = await other.ask("loom.intake.public.normal.t1", body)  # straight into the intake, as a Runtime does
    assert ack["stream"] == "LOOM_INTAKE"
    await until(lambda: bool(other.messages), what="the refusal has come")
    [(subject, result)] = other.messages
    assert (subject, result["state"], result["error"]["code"]) == ("loom.result.public.t1", "failed", "invalid_task")
    assert await running()
    assert (await operator.ask("loom.status.t1"))["state"] == "running"  # by the plain subject, in LOOM itself
    assert (await ann.ask("loom.cancel.t1"))["state"] == "cancelled"


async def test_a_reply_subject_from_an_account_is_not_a_command_in_the_cluster(clients: Clients) -> None:
    ann, other, operator = clients
    assert (await ann.ask("loom.submit", {"task_id": "t1", "domain": "code", "description": "endless", "wait": False}))[
        "state"
    ] == "accepted"
    await operator.listen("_INBOX.victim.>")
    ad = {"task_id": "t2", "domain": "code", "description": "x"}
    for reply in (
        "loom.cancel.t1",
        "_INBOX.victim.1",
        "loom.from.TEAM_A.cancel.t1",
        "$JS.API.STREAM.PURGE.LOOM_INTAKE",
    ):
        await other.nc.publish("loom.submit", json.dumps(ad).encode(), reply=reply)
        stored = {"ad": {**ad, "task_id": "t3"}, "submission": "s3", "reply_to": reply}
        await other.nc.publish("loom.intake.public.normal.t3", json.dumps(stored).encode(), reply=reply)
    await other.nc.flush()

    async def ended(task_id: str) -> bool:
        return bool((await other.ask(f"loom.status.{task_id}")).get("state") == "succeeded")

    for task_id in ("t2", "t3"):
        await until(lambda task_id=task_id: ended(task_id), what=f"{task_id} has ended")  # type: ignore[misc]
    assert (await ann.ask("loom.status.t1"))["state"] in ("accepted", "running")
    results = [body for subject, body in operator.messages if subject.startswith("_INBOX.victim")]
    assert all(body["task_id"] == "t3" for body in results)  # what a stored submission asks for, in LOOM's own inboxes


async def test_a_submitter_may_publish_nothing_else(clients: Clients) -> None:
    ann, other, operator = clients
    await operator.listen("loom.>")
    forbidden = (
        "loom.from.TEAM_B.cancel.t1",
        "loom.task.evaluate.normal.t1",
        "loom.intake.TEAM_B.normal.t1",
        "$SRV.PING",
    )
    for subject in forbidden:
        await ann.nc.publish(subject, b"{}")
        await other.nc.publish(subject, b"{}")  # free in its own account, without a subscriber
    for one in (ann, other):
        await one.nc.flush()
    await until(lambda: len(ann.errors) == len(forbidden), what="every publish is refused")
    assert all("permissions violation" in error.lower() for error in ann.errors)
    await operator.nc.flush()
    assert not [subject for subject, _ in operator.messages if subject in forbidden]


def test_a_server_refuses_an_import_under_the_name_of_another_account(tmp_path: Path) -> None:
    conf = tmp_path / "nats.conf"
    conf.write_text(accounts(f"{tmp_path}/js", account("TEAM_A"), account("TEAM_B")))
    assert subprocess.run(check_command(str(conf)), capture_output=True, check=False).returncode == 0
    conf.write_text(accounts(f"{tmp_path}/js", account("TEAM_A"), account("TEAM_B", submitter="TEAM_A")))
    refused = subprocess.run(check_command(str(conf)), capture_output=True, check=False, text=True)
    assert refused.returncode != 0
    assert "TEAM_A" in refused.stderr + refused.stdout


@pytest.mark.slow
async def test_a_runtime_in_an_account_needs_no_name_and_no_more_permissions_than_a_bare_client(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NATS_URL", url_of("TEAM_A", address))
    async with Runtime() as rt:
        assert await rt.submit({"domain": "code", "description": "sort"}) == "done: sort"
        handle = await rt.publish({"domain": "code", "description": "endless"})
        assert (await handle.cancel()).state == "cancelled"
    refused = [record.getMessage() for record in caplog.records if "ermissions" in record.getMessage()]
    assert not refused


# -- the example clients


@pytest.fixture(scope="session")
def javascript_client() -> Path:
    """`client.mjs` next to its one package."""
    folder = javascript_folder()
    shutil.copy(EXAMPLES / "client.mjs", folder / "client.mjs")
    return folder / "client.mjs"


@pytest.fixture(params=["client.py", pytest.param("client.mjs", marks=pytest.mark.slow)])
def words(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The command of an example client."""
    if request.param == "client.py":
        return (sys.executable, str(EXAMPLES / "client.py"))
    return ("node", str(request.getfixturevalue("javascript_client")))


@pytest.mark.parametrize("name", ["client.py", "client.mjs"])
def test_an_example_client_has_fewer_than_40_lines(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 40


async def test_an_example_client_prints_the_text_and_the_result(
    address: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    async with command(tmp_path, *words, url_of("TEAM_A", address), "sort a list") as client:
        ended = await client.end()
    assert ended.code == 0, ended.err
    text, result = ended.out.splitlines()
    assert text == "done: sort a list"
    assert json.loads(result)["content"] == text


async def test_an_example_client_reads_the_address_from_the_environment_and_cancels(
    address: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    async with command(tmp_path, *words, "endless", NATS_URL=url_of("TEAM_B", address)) as client:
        await client.wait_for_output("done: ")
        ended = await client.end(signal.SIGINT)
    assert ended.code == 1, ended.err
    result = json.loads(ended.out.splitlines()[-1])
    assert (result["state"], result["error"]["code"]) == ("cancelled", "cancelled")
    async with Bus(url_of("loom", address)) as bus:
        status = json.loads((await bus.requests.request(bus.subjects.of("status", result["task_id"]))).data)
    assert status["state"] == "cancelled"
