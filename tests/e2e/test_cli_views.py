"""The views of the command line on one cluster: their text at any width, piped, and on an empty cluster."""

import asyncio
import json
import re
import secrets
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.background import Cluster, background_cluster
from support.command import LOOM, command
from support.in_process import Loom, is_refused
from support.nodes import echo, fail, node
from support.wait import until

from loom.bus import task_client
from loom.bus.host_directory import AnnouncedHost
from loom.bus.rewards import RewardBus
from loom.schemas.base import decode
from loom.schemas.errors import UnknownTask
from loom.schemas.identity import node_key
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import Reward
from loom.schemas.plan import SplitPlan
from loom.schemas.record import TaskRecord
from loom.schemas.run import RunRequest
from loom.schemas.task import TaskAd

HEX = "0123456789abcdef" * 2
EVIL = "hello [red]\x1b[31m"
VIEWS = (
    *("task ls", "task show t1", "task show going", "node ls", "node show good", "host ls"),
    *("reward ls", "reward rebuild"),
)


async def endless(job: RunRequest) -> str:
    await asyncio.sleep(600)
    return "never"


@pytest.fixture(scope="module")
def cluster(nats_url: str) -> Iterator[Cluster]:
    """A cluster with a task done at the second attempt, one with a long id, and an endless running one."""
    nodes = [node("good", echo, loud=0.8), node("bad", fail, loud=0.9), node("slow", endless, loud=0.01)]
    with background_cluster(nats_url, f"t{secrets.token_hex(4)}", nodes) as cluster:
        cluster.do(_work(cluster))
        yield cluster
        cluster.do(task_client.cancel(cluster.bus, "going"))


async def _work(cluster: Cluster) -> None:
    for task_id, node_id in (("t1", None), (HEX, "good")):
        labels = {"tenant": "acme", "at": task_id[:2]}
        ad = TaskAd(task_id=task_id, domain="loud", description=EVIL, node_id=node_id, labels=labels)
        handle = await task_client.publish(cluster.bus, ad)
        assert (await handle.result(10)).success
    rewards = [reward async for reward in RewardBus(bus=cluster.bus).replay()]
    assert [reward.node_id for reward in rewards] == ["bad", "good", "good"]
    await _begin(cluster, "going")


async def _begin(cluster: Cluster, task_id: str) -> None:
    """Submit an endless task, and wait until it runs."""

    async def runs() -> bool:
        record = await handle.record()
        return record is not None and record.claim.attempt > 0

    handle = await task_client.publish(cluster.bus, TaskAd(task_id=task_id, node_id="slow", description="go on"))
    await until(lambda: _known(runs), what=f"{task_id} runs")
    await handle.close()


async def _known(ask: Callable[[], Awaitable[bool]]) -> bool:
    try:
        return await ask()
    except UnknownTask:  # on its way into the intake
        return False


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_every_view_fits_its_width_and_steers_no_terminal(
    columns: int, here: Cluster, loom: Loom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for line in VIEWS:
        ended = loom(line)

        assert (ended.code, ended.err) == (0, ""), line
        assert "\x1b" not in ended.out, line
        if line != "reward ls":  # lines for pipes, not a table
            assert max(map(len, ended.out.splitlines())) <= columns, line


def test_a_task_is_shown_from_submission_to_result(here: Cluster, loom: Loom) -> None:
    out = loom("task show t1").out

    assert re.match(r"t1  succeeded after \d", out)
    assert '"hello [red]�[31m"' in out
    hops = [line.split() for line in out.partition("Hops")[2].partition("Bids")[0].splitlines()[2:] if line.strip()]
    assert [(hop[2], hop[3]) for hop in hops] == [
        (phase, attempt)
        for attempt, phases in (("1", "sense match execute evaluate"), ("2", "match execute evaluate"))
        for phase in phases.split()
    ]
    assert re.search(r"good +0\.80 +- +0 +0\.80 +0\.00 +0\.\d\d +1\.00 +0\.\d\d", out)
    assert re.search(r"good won with 0\.\d\d to 0\.\d\d of\s+slow: it is trusted more", out)
    assert re.search(r"Policy glr_ucb, by (rewards up to \d+|claims alone).* total = 0\.6 trust", out)
    assert re.search(r"1 +bad +agent_failed", out)
    assert re.search(r"2 +good +succeeded", out)
    assert re.search(r"1 +bad +rules +0\.00 .* agent_failed", out)
    assert "Error of the attempt before: agent_failed: the agent raised RuntimeError" in out
    assert "Excluded: bad" in out
    assert "judged 1.00)\ndone: hello" in out


def test_a_running_task_is_shown_up_to_its_current_phase(here: Cluster, loom: Loom) -> None:
    out = loom("task show going").out

    assert re.match(r"going  running for .*, in execute on slow, \d+ s left", out)
    assert re.search(r"1 +slow +running", out)
    assert "slow was given the task without an auction" in out


def test_a_record_is_printed_whole_and_found_by_its_first_digits(here: Cluster, loom: Loom) -> None:
    record = decode(loom(f"task show {HEX[:8]} --json").out.encode(), TaskRecord)

    assert record.task_id == HEX
    assert record.envelope.hops
    running = decode(loom("task show going --json").out.encode(), TaskRecord)
    assert [hop.phase for hop in running.envelope.hops] == ["sense", "match"]


def test_tasks_are_listed_newest_first_and_filtered_by_their_facts(here: Cluster, loom: Loom) -> None:
    def listed(options: str) -> list[str]:
        return [
            decode(line.encode(), TaskRecord).task_id for line in loom(f"task ls --json {options}").out.splitlines()
        ]

    assert listed("--state succeeded --domain loud") == [HEX, "t1"]
    assert listed("--state succeeded --domain loud --limit 1") == [HEX]
    assert listed("--node slow --state running") == ["going"]
    assert listed("--domain loud") == listed("--label tenant=acme") == [HEX, "t1"]
    assert listed("--label tenant=acme --label at=t1") == ["t1"]
    assert listed("--label tenant=") == []
    assert listed("--node unknown") == []
    assert re.search(r"01234567 +succeeded +loud +good ", loom("task ls").out)
    assert loom("task ls --node unknown").out == "no such task among those of the last 72 hours\n"


PLAN = [
    {"id": "top", "description": "read"},
    {"id": "left", "description": "go left", "dependencies": ["top"]},
    {"id": "right", "description": "block", "dependencies": ["top"]},
    {"id": "end", "description": "close", "dependencies": ["left", "right"]},
]


@pytest.mark.slow
def test_a_divided_task_is_drawn_while_it_runs_and_when_it_has_ended(
    nats_url: str, namespace: str, loom: Loom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATS_URL", nats_url)
    monkeypatch.setenv("LOOM_NAMESPACE", namespace)
    monkeypatch.setenv("COLUMNS", "100")
    opened = threading.Event()

    def work(job: RunRequest) -> str:
        if job.description == "block":
            assert opened.wait(20)
        return f"{job.description} after {', '.join(job.inputs) or 'nothing'}"

    with background_cluster(nats_url, namespace, [node("ann", work), node("bob", work)]) as cluster:

        async def divided() -> bool:
            entry = await cluster.bus.bucket("plans", SplitPlan).get("report")
            return entry is not None and [part.state for part in entry.value.subtasks][1:3] == ["succeeded", "running"]

        ad = TaskAd(task_id="report", domain="code", description="report it all", context={"plan": PLAN})
        handle = cluster.do(task_client.publish(cluster.bus, ad))
        cluster.do(until(divided, within_s=15, what="one part runs"))
        running = re.sub(" +\n", "\n", loom("task show report").out)
        listed = loom("task ls").out
        opened.set()
        result = cluster.do(handle.result(15))
        ended, printed = loom("task show report").out, json.loads(loom("task show report --json").out)
        child = loom(f"task show {printed['plan']['subtasks'][3]['child_id']}").out
        closed = loom("task ls").out
        whole = cluster.do(
            task_client.publish(cluster.bus, TaskAd(task_id="one", description="x", context={"plan": True}))
        )
        cluster.do(whole.result(15))
        undivided = loom("task show one").out

    assert result.content == "report it all after top, left, right, end"
    assert re.match(r"report  running for .*, divided, 2 of 4 subtasks done, \d+ s left", running)
    assert re.search(r"├─ top +succeeded +(ann|bob) .* read\n", running)
    assert re.search(r"├─ right +running +(ann|bob) .* top .* block\n", running)
    assert re.search(r"└─ end +waiting +left, right +close\n", running)
    assert re.search(r"running .* report/right: block", listed)
    assert re.search(r"4 of 4 subtasks done", ended)
    assert [part["state"] for part in printed["plan"]["subtasks"]] == ["succeeded"] * 4
    assert decode(json.dumps(printed).encode(), TaskRecord).task_id == "report"
    assert "subtask end of report" in child
    assert re.search(r"report +succeeded .* \(4 subtasks\) report it all", closed)
    assert "not divided: no model is configured to plan" in undivided
    assert "subtasks done" not in undivided


@pytest.mark.slow
def test_nodes_are_shown_with_their_evidence(here: Cluster, loom: Loom) -> None:
    out, loud = loom("node ls").out, loom("node ls --domain loud").out
    alive = {one["node_id"]: one for one in map(json.loads, loom("node ls --json").out.splitlines())}
    host = decode(loom("host ls --json").out.encode(), AnnouncedHost)

    assert len(re.findall(r"^ *(bad|good|slow) ", out, flags=re.MULTILINE)) == 3
    assert re.search(r"bad .* unproven .* loud 0\.00", out)
    assert re.search(
        r"bad +unproven +\N{EN DASH} +0\.00 ±0\.43 +1 +\+0\.00 +▁", loud
    )  # excluded from the auction that is known
    assert re.search(r"good +\w+ +0\.80 +\d\.\d\d ±\d\.\d\d +\d +[+-]\d\.\d\d +[▁-█]+", loud)
    assert "nothing is known" in loom("node ls --domain nowhere").out
    assert alive["slow"]["hosts"] == [host.host_id]
    assert alive["good"]["profile"]["domains"]["loud"]["count"] >= 2
    assert (alive["bad"]["standing"], alive["slow"]["standing"]) == ("unproven", "new")
    assert 0 < alive["good"]["uncertainty"]["loud"] < alive["bad"]["uncertainty"]["loud"]
    assert host.node_ids == ("bad", "good", "slow")


def test_the_reward_of_a_person_is_listed(here: Cluster, loom: Loom) -> None:
    assert loom(f"reward add {HEX} 0.4 --reason dull").out == "0.40 for good in loud\n"

    last = decode(loom("reward ls --node good --domain loud --limit 1 --json").out.encode(), Reward)
    assert (last.task_id, last.score, last.source, last.reason) == (HEX, 0.4, "person", "dull")
    assert re.search(r"0\.00  bad +loud +t1  by rules: agent_failed\n", loom("reward ls").out)
    assert loom("reward ls --node unknown").out == "no such rewards\n"
    assert re.search(r"2 +good +person +0\.40|1 +good +person +0\.40 .* dull", loom(f"task show {HEX}").out)


def test_a_rebuild_confirms_correct_profiles_and_repairs_wrong_ones(here: Cluster, loom: Loom) -> None:
    ended = loom("reward rebuild")
    assert ended.code == 0
    assert re.search(r"bad +1 0\.00 +1 0\.00 +\d+ +as stored +\n", ended.out)
    assert "Folded from its first reward to reward" in ended.out

    here.do(_spoil(here, "bad"))
    spoilt = loom("reward rebuild")
    assert spoilt.code == 1
    assert re.search(r"bad +7 1\.00 +1 0\.00 +\d+ +stored otherwise", spoilt.out)
    assert "--write" in spoilt.out
    printed = [json.loads(line) for line in loom("reward rebuild --write --json").out.splitlines()]
    assert {one["node_id"]: one["written"] for one in printed} == {"bad": True, "good": False}
    assert loom("reward rebuild").code == 0


async def _spoil(cluster: Cluster, node_id: str) -> None:
    bucket = cluster.bus.bucket("nodes", NodeProfile)
    entry = await bucket.get(node_key("local", node_id))
    assert entry is not None
    await bucket.update(entry.key, replace(entry.value, total_tasks=7, success_rate=1.0), entry.revision)


def test_a_task_is_cancelled_once(here: Cluster, loom: Loom) -> None:
    here.do(_begin(here, "unwanted"))

    assert loom("task cancel unwanted") == (0, "unwanted cancelled\n", "")
    assert loom("task cancel unwanted").code == 0
    assert loom("task cancel t1") == (1, "t1 had ended before: succeeded\n", "")
    assert re.match(r"unwanted  cancelled after .*", loom("task show unwanted").out)


@pytest.mark.slow
async def test_a_tap_prints_past_messages_and_then_new_ones_that_match(here: Cluster, tmp_path: Path) -> None:
    where = {"NATS_URL": here.url, "LOOM_NAMESPACE": here.namespace}
    async with (
        command(tmp_path, *LOOM, "tap", "--since", "1h", "--node", "good", **where) as tap,
        command(tmp_path, *LOOM, "reward", "ls", "--follow", "--limit", "1", "--json", **where) as rewards,
    ):
        await tap.wait_for_output("for t1, by rules")
        await rewards.wait_for_output("reward_id")
        ad = TaskAd(task_id="t9", description="x", domain="quiet", node_id="good")
        handle = await asyncio.to_thread(here.do, task_client.publish(here.bus, ad))
        await tap.wait_for_output("for t9, by rules")
        await tap.wait_for_output(f"{'result':<16} t9 ")
        await rewards.wait_for_output('"task_id":"t9"')
        ended = await tap.end(signal.SIGINT)
        assert (await rewards.end(signal.SIGINT)).code == 130
    await asyncio.to_thread(here.do, handle.close())

    assert ended.code == 130
    assert re.search(r"result +t1 +succeeded on good, attempt 2", ended.out)
    assert re.search(r"run +t9 +run on good", ended.out)
    assert re.search(r"result +t9 +succeeded on good", ended.out)
    assert not re.search(r"reward +bad |result +going", ended.out)
    assert ended.err == f"listening on {here.url}, namespace {here.namespace}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("task show nosuch", 1, "unknown_task: no task nosuch is known"),
        ("task show 01234560", 1, "unknown_task: no task 01234560 is known"),
        ("task show a.b", 2, "invalid_task: task_id must match"),
        ("task cancel nosuch", 1, "unknown_task: "),
        ("reward add nosuch 1", 1, "unknown_task: "),
        ("reward add t1 1.5", 2, "invalid_task: score must be from 0 to 1"),
        ("reward add going 1", 2, "invalid_task: only a task that a node has finished"),
        ("task ls --state lost", 2, "bad_usage: Invalid value for --state: 'lost' is not one of queued"),
        ("tap --since soon", 2, "bad_usage: Invalid value: 'soon' is not a time; write it like 90s"),
        ("tap --phase brew", 2, "bad_usage: Invalid value for --phase: 'brew' is not one of sense"),
        ("reward ls --node a.b.c", 2, "invalid_task: owner must match"),
    ],
)
def test_an_impossible_command_is_refused_in_one_line(
    line: str, code: int, message: str, here: Cluster, loom: Loom
) -> None:
    is_refused(loom, line, code, message)


COMMANDS = (
    "task ls",
    "task show t1",
    "node ls",
    "host ls",
    "reward ls",
    "task cancel t1",
    "reward add t1 1",
    "tap --since 1m",
)


def test_every_command_reports_that_no_phases_have_run(
    here: Cluster, loom: Loom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOM_NAMESPACE", "unused")
    for line in COMMANDS:
        ended = loom(line)
        assert (ended.code, ended.out) == (3, ""), line
        assert ended.err.splitlines()[-1].startswith("bus_unavailable: no phases have run in namespace unused"), line


@pytest.mark.slow
def test_every_command_reports_a_missing_server(loom: Loom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loom.runner.cli.common.PATIENCE_S", 0.1)
    monkeypatch.setattr("loom.runner.cli.commands.tap.PATIENCE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        monkeypatch.setenv("NATS_URL", f"nats://127.0.0.1:{probe.getsockname()[1]}")
    for line in COMMANDS:
        ended = loom(line)
        assert (ended.code, ended.out) == (3, ""), line
        assert re.fullmatch(r"bus_unavailable: no nats-server at [^\n]*\n", ended.err), line


@pytest.mark.slow
def test_an_empty_cluster_is_described_in_one_sentence(
    nats_url: str, namespace: str, loom: Loom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATS_URL", nats_url)
    monkeypatch.setenv("LOOM_NAMESPACE", namespace)
    with background_cluster(nats_url, namespace, []) as empty:
        empty.do(empty.bus.requests.flush())
        tasks, rewards, nodes = loom("task ls"), loom("reward ls"), loom("node ls")
        assert loom("task ls --json") == loom("reward ls --json") == loom("node ls --json") == (0, "", "")

    assert tasks == (0, 'no tasks yet: submit one with `loom submit "what is to do"`\n', "")
    assert rewards == (0, "no rewards yet: they come with the first ended task\n", "")
    assert nodes == (0, "no nodes are alive or remembered: start some with `loom host run FILE.py`\n", "")
    assert threading.active_count() < 10


def test_a_task_list_shows_phase_and_age_and_queued_tasks_as_queued(here: Cluster, loom: Loom) -> None:
    ad = TaskAd(task_id="unplaced", node_id="absent", description="An Invoice to check")
    here.do(_publish(here, ad))
    here.do(until(lambda: _is_known(here, "unplaced"), what="the task is admitted"))

    listed = [json.loads(line) for line in loom("task ls --text INVOICE --json").out.splitlines()]
    assert [(task["task_id"], task["queued"]) for task in listed] == [("unplaced", True)]
    assert re.search(r"\d+s +unplaced +queued +.*(match|later|sense)? +An Invoice", loom("task ls --text invoice").out)
    assert re.search(r"going +running .* execute +go on", loom("task ls --state running").out)
    assert "unplaced" not in loom("task ls --state running").out
    assert "unplaced" in loom("task ls --state queued").out
    assert loom("task ls --text nowhere").out == "no such task among those of the last 72 hours\n"
    here.do(task_client.cancel(here.bus, "unplaced"))


async def _publish(cluster: Cluster, ad: TaskAd) -> None:
    await (await task_client.publish(cluster.bus, ad)).close()


async def _is_known(cluster: Cluster, task_id: str) -> bool:
    """Return whether the task is at MATCH."""
    state = (
        await cluster.bus.jetstream.api(
            f"STREAM.INFO.{cluster.bus.subjects.stream('TASKS')}", {"subjects_filter": f"*.*.match.*.{task_id}"}
        )
    )["state"]
    return bool(state.get("subjects"))


@pytest.mark.slow
async def test_a_task_list_follows_changes(here: Cluster, tmp_path: Path) -> None:
    where = {"NATS_URL": here.url, "LOOM_NAMESPACE": here.namespace}
    async with command(tmp_path, *LOOM, "task", "ls", "--follow", "--text", "followed", **where) as tasks:
        await tasks.wait_for_output("no such task")
        for task_id in ("followed-1", "unseen"):
            ad = TaskAd(task_id=task_id, description="x", domain="quiet", node_id="good")
            await asyncio.to_thread(here.do, _publish(here, ad))
        await tasks.wait_for_output("succeeded")
        ended = await tasks.end(signal.SIGINT)

    assert ended.code == 130
    assert re.search(r"followed-1 +succeeded +quiet +good +x", ended.out)
    assert "unseen" not in ended.out


@pytest.mark.slow
def test_a_node_is_shown_with_a_row_for_each_domain(here: Cluster, loom: Loom) -> None:
    shown = loom("node show good").out

    assert re.match(r"good  \w+\nhosts: \w+\n\d+ tasks, 0 failures in a row", shown)
    assert re.search(r"loud +0\.80 +\d\.\d\d ±\d\.\d\d", shown)
    assert json.loads(loom("node show good --json").out)["node_id"] == "good"
    assert loom("node show nosuch").err.startswith("unknown_node: no node nosuch is alive or remembered")


@pytest.mark.slow
async def test_a_stopping_host_reports_its_running_tasks_at_once(here: Cluster, tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(
        "import asyncio\n"
        "from loom.types import AgentNode, CapabilityProfile\n"
        "async def work(description: str) -> str: await asyncio.sleep(600); return 'x'\n"
        "nodes = [AgentNode(id='endless', capabilities=CapabilityProfile(scores={'t': 0.9}), agent=work)]\n"
    )
    where = {"NATS_URL": here.url, "LOOM_NAMESPACE": here.namespace, "LOOM_DRAIN_TIMEOUT_S": "1"}
    async with command(tmp_path, *LOOM, "host", "run", str(tmp_path / "endless.py"), **where) as host:
        await host.wait_for_output("endless on nats")
        ad = TaskAd(task_id="long", description="x", domain="t", node_id="endless")
        await asyncio.to_thread(here.do, _publish(here, ad))
        await asyncio.to_thread(here.do, until(lambda: _runs(here, "long"), what="the run has begun"))
        ended = await host.end(signal.SIGINT)
        await asyncio.to_thread(here.do, task_client.cancel(here.bus, "long"))

    assert "stopping: 1 run in hand, waiting up to 1 s; Ctrl-C again stops at once" in ended.err


async def _runs(cluster: Cluster, task_id: str) -> bool:
    try:
        record = await task_client.record(cluster.bus, task_id)
    except UnknownTask:
        return False
    return record is not None and record.claim.attempt > 0
