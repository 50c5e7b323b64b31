"""Nodes of several owners in one cluster: the views of operators, and evidence that follows a new name."""

import json
import re
import secrets
from collections.abc import Iterator

import pytest
from support.background import Cluster, background_cluster
from support.in_process import Loom, is_refused
from support.nodes import echo, fail, node
from support.wait import until

from loom import Runtime
from loom.bus import task_client
from loom.bus.rewards import RewardBus
from loom.runner.services import running_nodes
from loom.schemas.identity import Identity
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.task import TaskAd


@pytest.fixture(scope="module")
def cluster(nats_url: str) -> Iterator[Cluster]:
    """A node `coder` of the owner acme, which succeeds, and one of the owner `local`, which fails."""
    namespace = f"t{secrets.token_hex(4)}"
    with background_cluster(nats_url, namespace, [node("coder", fail, code=0.9)]) as cluster:
        guests = running_nodes(
            nats_url, lambda: [node("coder", echo, code=0.8)], namespace=namespace, identity=Identity(owner="acme")
        )
        host = cluster.do(_entered(guests))
        try:
            cluster.do(_work(cluster))
            yield cluster
        finally:
            cluster.do(host.__aexit__(None, None, None))


async def _entered(context):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 - any context manager
    await context.__aenter__()
    return context


async def _work(cluster: Cluster) -> None:
    """Run a pinned task, and one that fails on the node of `local` and succeeds on the one of acme."""
    pinned = await task_client.publish(
        cluster.bus, TaskAd(task_id="t1", domain="code", description="x", node_id="acme.coder")
    )
    assert (await pinned.result(10)).owner == "acme"
    second = await task_client.publish(cluster.bus, TaskAd(task_id="t2", domain="code", description="x"))
    assert (await second.result(10)).success
    await until(lambda: _total(cluster, "acme.coder", 2), what="two tasks are learned")


async def _total(cluster: Cluster, key: str, total: int) -> bool:
    entry = await cluster.bus.bucket("nodes", NodeProfile).get(key)
    return entry is not None and entry.value.total_tasks == total


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_evidence_of_a_name_is_kept_by_owner(here: Cluster, loom: Loom) -> None:
    shown = lines(loom("node ls --json").out)
    assert {(one["owner"], one["node_id"]) for one in shown} >= {("local", "coder"), ("acme", "coder")}
    profiles = {(one["owner"], one["node_id"]): one["profile"] or {"domains": {}} for one in shown}  # type: ignore[index]
    assert profiles["acme", "coder"]["domains"]["code"]["mean"] > 0.5  # type: ignore[index]
    assert profiles["local", "coder"]["domains"].get("code", {"mean": 0.0})["mean"] == 0.0  # type: ignore[index]


@pytest.mark.slow
def test_views_name_the_owner_unless_it_is_local(here: Cluster, loom: Loom) -> None:
    assert re.search(r"^ *acme\.coder +unproven ", loom("node ls").out, re.MULTILINE)
    assert "local." not in loom("node ls").out + loom("task ls").out + loom("reward ls").out
    assert re.search(r"1\.00  acme\.coder +code +t1  by rules", loom("reward ls").out)
    assert "acme.coder" in loom("task show t1").out
    assert "pinned" in loom("task show t1").out


def test_filters_accept_a_node_with_its_owner_and_local_nodes_in_both_forms(here: Cluster, loom: Loom) -> None:
    assert "by rules" in loom("reward ls --node acme.coder").out
    assert loom("reward ls --node coder").out == loom("reward ls --node local.coder").out
    assert [one["task_id"] for one in lines(loom("task ls --node acme.coder --json").out)] == ["t2", "t1"]
    assert loom("task ls --node coder").out == "no such task among those of the last 72 hours\n"


def test_a_person_judges_under_the_configured_source(
    here: Cluster, loom: Loom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOM_SOURCE", "alice")
    assert loom("reward add t1 0.5").out == "0.50 for acme.coder in code\n"
    assert "by alice" in loom("reward ls --node acme.coder").out
    here.do(_judged(here))


async def _judged(cluster: Cluster) -> None:
    given = [one async for one in RewardBus(bus=cluster.bus).replay(node_id="acme.coder") if one.source == "alice"]
    assert [(one.reward_id, one.owner) for one in given] == [("t1:1:alice", "acme")]


def test_a_renamed_node_takes_its_evidence_along_once(here: Cluster, loom: Loom) -> None:
    moved = loom("node move acme.coder beta.writer")
    assert moved.code == 0, moved
    assert re.fullmatch(r"acme\.coder → beta\.writer: code [01]\.\d\d of 2 rewards, as one observation\n", moved.out)
    here.do(until(lambda: _inherited(here), what="the evidence has moved"))  # type: ignore[arg-type]
    assert loom("node move acme.coder beta.writer").out.endswith("moved before\n")
    here.do(_one_inheritance(here))


async def _inherited(cluster: Cluster) -> bool:
    entry = await cluster.bus.bucket("nodes", NodeProfile).get("beta.writer")
    return entry is not None and [score.attempt_id for score in entry.value.domains["code"].scores] == [
        "inherit:acme.coder"
    ]


async def _one_inheritance(cluster: Cluster) -> None:
    given = [one async for one in RewardBus(bus=cluster.bus).replay(node_id="beta.writer")]
    assert [(one.kind, one.source) for one in given] == [("inherit", "adapt")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("node move ghost coder", "no_evidence: nothing is known of ghost"),
        ("node move coder local.coder", "bad_usage: Invalid value for TO: FROM and TO are both coder"),
        ("node move a.b.c coder", "bad_usage: Invalid value for FROM"),
    ],
)
def test_an_impossible_move_is_refused(line: str, message: str, here: Cluster, loom: Loom) -> None:
    is_refused(loom, line, 2, message)


@pytest.mark.slow
async def test_a_runtime_of_a_named_owner_learns_of_its_own_nodes(
    here: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOM_OWNER", "gamma")
    monkeypatch.setenv("LOOM_SOURCE", "bob")
    async with Runtime() as rt:
        coder = rt.add_agent(echo, name="coder", capabilities={"sums": 0.9})
        task = TaskAd(task_id="sum", domain="sums", description="x", node_id="gamma.coder")
        assert await rt.submit(task)
        await until(lambda: coder.capabilities.total_tasks == 1, what="the node is shown what was learned")
        assert coder.capabilities.scores["sums"] > 0.9
        await rt.feedback("sum", 0.0)
        await until(lambda: coder.capabilities.scores["sums"] < 0.9, what="the feedback is learned")
        [mine] = [each for each in await rt.nodes() if each.owner == "gamma"]
        assert (mine.name, mine.alive, mine.hosts[0].owner) == ("gamma.coder", True, "gamma")
        given = [one async for one in rt.reward_bus.replay(node_id="gamma.coder")]
        assert [one.source for one in given] == ["rules", "bob"]
        [report] = rt.health_check()
        assert report.node_id == "coder"
