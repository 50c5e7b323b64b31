"""`loom submit`: the sources of the ad, and the options."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.background import Cluster, background_cluster
from support.in_process import Loom, is_refused
from support.nodes import echo, node

from loom.bus import task_client
from loom.schemas.record import TaskRecord
from loom.schemas.task import TaskAd


@pytest.fixture(scope="module")
def cluster(nats_url: str) -> Iterator[Cluster]:
    with background_cluster(nats_url, "submit-options", [node("n", echo, code=0.9)]) as cluster:
        yield cluster


def ad_of(cluster: Cluster, task_id: str) -> TaskAd:
    record: TaskRecord | None = cluster.do(task_client.record(cluster.bus, task_id))
    assert record is not None
    return record.envelope.ad


def test_an_ad_has_the_id_the_conditions_and_the_budget_of_the_options(here: Cluster, loom: Loom) -> None:
    ended = loom('submit hello --domain code --task-id mine --budget 500 --accept {"contains":["done"]}')

    assert (ended.code, ended.out) == (0, "done: hello\n"), ended
    ad = ad_of(here, "mine")
    assert (ad.token_budget, ad.accept.contains if ad.accept else ()) == (500, ("done",))


def test_a_description_is_read_from_standard_input(here: Cluster, loom: Loom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("good night\n"))

    assert loom("submit - --domain code").out == "done: good night\n"


def test_an_ad_is_read_from_a_file_and_options_override_its_fields(here: Cluster, loom: Loom, tmp_path: Path) -> None:
    file = tmp_path / "task.json"
    file.write_text(json.dumps({"description": "x", "domain": "code", "priority": "high", "labels": {"a": "b"}}))

    assert loom(f"submit --ad {file} --task-id filed").out == "done: x\n"
    assert loom(f"submit y --ad {file} --task-id renamed --priority low").out == "done: y\n"
    assert (ad_of(here, "filed").priority, ad_of(here, "filed").labels) == ("high", {"a": "b"})
    assert ad_of(here, "renamed").priority == "low"


def test_an_ad_is_read_from_standard_input(here: Cluster, loom: Loom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"description": "piped", "domain": "code"}'))

    assert loom("submit --ad -").out == "done: piped\n"


@pytest.mark.parametrize(
    ("line", "begin"),
    [
        ("submit", "bad_usage: Invalid value for DESCRIPTION: give a description, - for stdin, or --ad FILE"),
        ("submit - --ad -", "bad_usage: Invalid value for --ad: stdin cannot be both"),
        ("submit --ad nosuch.json", "invalid_file: nosuch.json: No such file or directory"),
        ("submit x --accept {", "invalid_task: accept is not JSON"),
        ('submit x --accept {"maybe":1}', "invalid_task: "),
        ("submit x --budget 0", "invalid_task: "),
        ("submit x --task-id a.b", "invalid_task: "),
    ],
)
def test_a_wrong_option_is_one_line(line: str, begin: str, here: Cluster, loom: Loom) -> None:
    is_refused(loom, line, 2, begin)
