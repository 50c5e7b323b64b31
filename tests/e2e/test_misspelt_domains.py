"""A misspelt domain, in Python and on the command line."""

import secrets
from collections.abc import Iterator

import pytest
from support.background import Cluster, background_cluster
from support.in_process import Loom
from support.logs import capture_logs
from support.nodes import echo, node

from loom import Runtime, TaskAd
from loom.types import AgentNode

WARNING = "no node rates itself in 'sael'; did you mean 'sales'?"


@pytest.fixture
def cluster(nats_url: str) -> Iterator[Cluster]:
    nodes = [node("seller", echo, sales=0.9), AgentNode(id="any", agent=echo)]
    with background_cluster(nats_url, f"t{secrets.token_hex(4)}", nodes) as cluster:
        yield cluster


async def test_python_has_the_warning_in_the_result_and_in_the_log(here: Cluster) -> None:
    async with Runtime() as rt:
        result = await (await rt.publish(TaskAd(domain="sales", description="x"))).result()
        assert (result.success, result.warnings) == (True, ())
        with capture_logs() as lines:
            assert await rt.submit(TaskAd(task_id="t1", domain="sael", description="x")) == "done: x"
    (line,) = [line for line in lines if line["event"] == "task_warning"]
    assert (line["task_id"], line["warning"], line["log_level"]) == ("t1", WARNING, "warning")


def test_the_command_line_prints_the_warning_on_standard_error(here: Cluster, loom: Loom) -> None:
    ended = loom("submit x --domain sael")
    assert (ended.code, ended.out, ended.err) == (0, "done: x\n", f"warning: {WARNING}\n")
    assert (loom("submit x --domain sales").err, loom("submit x --domain poetry").err) == ("", "")


async def test_nodes_without_ratings_cause_no_warning(on_bus: tuple[str, str], phases: object) -> None:
    rt = Runtime()
    rt.add_agent(lambda text: text.upper(), name="any")
    async with rt:
        result = await (await rt.publish(TaskAd(domain="sael", description="x"))).result()
        assert (result.content, result.warnings) == ("X", ())
