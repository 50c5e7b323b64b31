"""`loom dead`: the list, display, retry and removal of messages that could not be handled."""

import base64
import json
import re
import secrets
from collections.abc import Iterator

import pytest
from msgspec.structs import replace
from support.background import Cluster, background_cluster
from support.in_process import Loom, is_refused
from support.nodes import echo, node
from support.raw_client import publish_raw
from support.wait import until

from loom.bus import task_client
from loom.bus.dead_letters import admin
from loom.bus.dead_letters.admin import Letter
from loom.runner.doctor.diagnosis import examine
from loom.schemas.base import MAX_MESSAGE_BYTES, encode
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope, Hop, Split
from loom.schemas.errors import UnknownTask
from loom.schemas.record import TaskRecord
from loom.schemas.task import TaskAd

EVIL = "hello [red]\x1b[31m\x9b"
NO_JSON = b"\xff\x00\x1b[31m" + "数据\u202e".encode() + b"\n{"
AD = TaskAd(task_id="t3", description=EVIL, domain="code", context={"n": 1})


@pytest.fixture(scope="module")
def cluster(nats_url: str) -> Iterator[Cluster]:
    """A cluster with dead letters: garbage, a large message, a task that skipped a phase, and a subtask."""
    with background_cluster(nats_url, f"t{secrets.token_hex(4)}", [node("n", echo, code=0.9)]) as cluster:
        cluster.do(_poison(cluster))
        yield cluster


async def _poison(cluster: Cluster) -> None:
    bus = cluster.bus
    part = Envelope(ad=TaskAd(task_id="t4", description="x"), deadline=1, split=Split(parent="p1", depth=1, deadline=1))
    poison = {
        bus.subjects.intake("public", "normal", "t1"): NO_JSON,
        bus.subjects.task("match", "normal", "t2"): b"[" + b"0," * (MAX_MESSAGE_BYTES // 2) + b"0]",
        bus.subjects.task("scale", "normal", "t3"): _skipped(cluster, AD),
        bus.subjects.task("execute", "normal", "t4"): encode(part),
    }
    for count, (subject, raw) in enumerate(poison.items(), 1):
        await bus.jetstream.publish(subject, raw)
        await _kept(cluster, count)


def _skipped(cluster: Cluster, ad: TaskAd) -> bytes:
    """An envelope that reaches SCALE without the award of MATCH."""
    hops = tuple(Hop(phase=phase, instance="i", started=1, finished=2) for phase in ("sense", "match"))
    return encode(Envelope(ad=ad, deadline=cluster.bus.clock.now() + 60, hops=hops))  # type: ignore[arg-type]  # phases all of them


async def _kept(cluster: Cluster, count: int) -> list[Letter]:
    async def there() -> list[Letter]:
        found = await admin.list_letters(cluster.bus, 100)
        return found if len(found) >= count else []

    return await until(there, within_s=20, what=f"{count} dead letters")


def test_letters_are_listed_newest_last(here: Cluster, loom: Loom) -> None:
    ended = loom("dead ls")
    rows = [line.split() for line in ended.out.splitlines()]

    assert (ended.code, ended.err) == (0, "")
    assert rows[0] == ["letter", "at", "phase", "task", "tries", "bytes", "reason"]
    assert [(row[0], *row[2:6]) for row in rows[1:]] == [
        ("1", "sense", "t1", "1", str(len(NO_JSON))),
        ("2", "match", "t2", "1", f"{MAX_MESSAGE_BYTES}+"),
        ("3", "scale", "t3", "1", rows[3][5]),
        ("4", "execute", "t4", "1", rows[4][5]),
    ]
    printed = [json.loads(line) for line in loom("dead ls --json --limit 2").out.splitlines()]
    assert [(one["seq"], one["phase"], one["deliveries"]) for one in printed] == [(3, "scale", 1), (4, "execute", 1)]
    assert "raw" not in printed[0]


def test_a_letter_of_json_is_shown_with_its_trail_and_its_fields(here: Cluster, loom: Loom) -> None:
    out = loom("dead show 3").out
    assert re.search(r"^reason +the envelope came without a spec$", out, re.MULTILINE)
    assert re.search(r"^phase +scale, after 1 delivery$", out, re.MULTILINE)
    assert re.search(r"^trail +sense → match → scale$", out, re.MULTILINE)
    assert re.search(rf"^subject +{here.namespace}\.task\.scale\.normal\.t3, sequence \d+$", out, re.MULTILINE)
    assert '\n    "task_id": "t3",\n' in out
    assert "hello [red]" in out

    whole = json.loads(loom("dead show 3 --json").out)
    assert whole["message"]["ad"]["description"] == EVIL
    assert json.loads(base64.b64decode(whole["raw"])) == whole["message"]
    assert (whole["trail"], whole["task_id"]) == ("sense match", "t3")


def test_letters_that_are_not_json_are_escaped_and_large_ones_are_cut(here: Cluster, loom: Loom) -> None:
    out = loom("dead show 1").out
    assert out.endswith("\n\\xff\\x00\\x1b[31m数据\\u202e\\n{\n")
    assert re.search(r"^trail +sense$", out, re.MULTILINE)
    large = loom("dead show 2").out
    assert "bytes are left of more" in large
    assert large.count("\n") < 50
    assert f"… and {MAX_MESSAGE_BYTES - 2048} more bytes; --json has them" in large
    whole = json.loads(loom("dead show 1 --json").out)
    assert (whole["message"], base64.b64decode(whole["raw"])) == (None, NO_JSON)


@pytest.mark.parametrize("columns", ["80", "120"])
def test_every_view_fits_its_width_and_steers_no_terminal(
    columns: str, here: Cluster, loom: Loom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for line in ("dead ls", *(f"dead show {seq}" for seq in (1, 2, 3, 4))):
        out = loom(line).out
        assert max(map(len, out.splitlines())) <= int(columns), line
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out), line


def test_a_retried_letter_is_a_new_task_that_succeeds_and_the_letter_is_gone(here: Cluster, loom: Loom) -> None:
    letter = here.do(_one_more(here))  # the other tests look at the first four
    ended = loom(f"dead retry {letter.seq}")
    submitted = re.fullmatch(rf"letter {letter.seq} submitted again as task ([0-9a-f]{{32}})\n", ended.out)
    assert submitted, ended

    async def done() -> TaskRecord:
        return await until(lambda: _ended(here, submitted[1]), within_s=20, what="the new task has ended")

    record = here.do(done())
    assert (record.state, record.envelope.ad.context) == ("succeeded", {"n": 1})
    gone = f"unknown_letter: there is no dead letter {letter.seq}; `loom dead ls` lists them\n"
    assert loom(f"dead show {letter.seq}") == (1, "", gone)


async def _one_more(cluster: Cluster) -> Letter:
    subject = cluster.bus.subjects.task("scale", "normal", "t5")
    await cluster.bus.jetstream.publish(subject, _skipped(cluster, replace(AD, task_id="t5")))
    return (await _kept(cluster, 5))[-1]


async def _ended(cluster: Cluster, task_id: str) -> TaskRecord | None:
    try:
        found = await task_client.record(cluster.bus, task_id)
    except UnknownTask:  # on its way into the intake
        return None
    return found if found is not None and found.ended else None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("dead retry 1", 1, "dead_letter: letter 1 holds no task that can be read"),
        ("dead retry 2", 1, "dead_letter: letter 2 holds no task that can be read (its bytes were cut)"),
        ("dead retry 4", 1, "dead_letter: letter 4 is a subtask of task p1"),
        ("dead retry 99", 1, "unknown_letter: there is no dead letter 99"),
        ("dead show 99", 1, "unknown_letter: there is no dead letter 99"),
        ("dead rm 99", 1, "unknown_letter: there is no dead letter 99"),
        ("dead retry", 2, "bad_usage: Invalid value for SEQ: give the numbers of letters, or --all"),
        ("dead rm 1 --all", 2, "bad_usage: Invalid value for SEQ: give the numbers of letters, or --all"),
        ("dead rm 1 --phase scale", 2, "bad_usage: Invalid value for --phase: --phase and --code need --all"),
        ("dead ls --phase brew", 2, "bad_usage: Invalid value for --phase: 'brew' is not one of sense"),
        ("dead ls --code odd", 2, "bad_usage: Invalid value for --code: 'odd' is not one of undecodable"),
        ("dead show 0", 2, "bad_usage: "),
        ("dead show one", 2, "bad_usage: "),
        ("dead bury 1", 2, "bad_usage: No such command 'bury'"),
    ],
)
def test_an_impossible_command_is_refused_in_one_line(
    line: str, code: int, message: str, here: Cluster, loom: Loom
) -> None:
    is_refused(loom, line, code, message)


@pytest.mark.slow
def test_doctor_counts_letters_until_they_are_dropped(
    nats_url: str, loom: Loom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATS_URL", nats_url)
    with background_cluster(nats_url, namespace := f"t{secrets.token_hex(4)}", []) as cluster:
        monkeypatch.setenv("LOOM_NAMESPACE", namespace)
        assert loom("dead ls") == (0, "no dead letters\n", "")
        assert loom("dead ls --json") == (0, "", "")
        publish_raw(nats_url, b"PUB %s.task.match.normal.a\x1b[31m 1\r\nx\r\n" % namespace.encode())
        cluster.do(_kept(cluster, 1))
        finding = cluster.do(examine(cluster.bus, ClusterConfig()))[-1]
        shown = loom("dead show 1")
        assert loom("dead rm 1") == (0, "letter 1 removed\n", "")
        assert loom("dead ls").out == "no dead letters\n"

    assert (finding.about, finding.message) == ("dead letters", "1 wait")
    assert "loom dead ls" in finding.todo
    assert "\x1b" not in shown.out + shown.err


def test_each_command_reports_missing_phases_or_a_missing_server(
    here: Cluster, loom: Loom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOM_NAMESPACE", "unused")
    for line in ("dead ls", "dead show 1", "dead retry 1", "dead rm 1"):
        ended = loom(line)
        assert (ended.code, ended.out) == (3, ""), line
        assert ended.err.splitlines()[-1].startswith("bus_unavailable: no phases have run in namespace unused"), line


def test_dead_without_a_command_lists_its_commands(loom: Loom) -> None:
    ended = loom("dead")
    assert ended.code == 0
    assert all(word in ended.out for word in ("ls", "show", "retry", "rm"))


def test_letters_are_selected_by_phase_and_code(here: Cluster, loom: Loom) -> None:
    def listed(options: str) -> list[tuple[str, str]]:
        letters = [json.loads(line) for line in loom(f"dead ls --json {options}").out.splitlines()]
        return [(letter["phase"], letter["code"]) for letter in letters[:4]]

    assert listed("--all") == [
        ("sense", "undecodable"),
        ("match", "undecodable"),
        ("scale", "incomplete"),
        ("execute", "incomplete"),
    ]
    assert listed("--phase match") == [("match", "undecodable")]
    assert listed("--code incomplete") == [("scale", "incomplete"), ("execute", "incomplete")]
    assert loom("dead ls --phase adapt").out == "no dead letters\n"
    assert "reason   undecodable" in loom("dead show --all --phase match").out


@pytest.mark.slow
def test_all_selected_letters_are_removed(nats_url: str, loom: Loom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_URL", nats_url)
    with background_cluster(nats_url, namespace := f"t{secrets.token_hex(4)}", []) as cluster:
        monkeypatch.setenv("LOOM_NAMESPACE", namespace)
        for phase in ("match", "match", "scale"):
            cluster.do(_publish_garbage(cluster, phase))
        cluster.do(_kept(cluster, 3))
        refused = loom("dead retry --all --phase scale")
        removed = loom("dead rm --all --phase match")
        left = loom("dead ls --json").out

    assert (refused.code, refused.err.count("dead_letter: letter")) == (1, 1)
    assert removed.out.count(" removed\n") == 2
    assert [json.loads(line)["phase"] for line in left.splitlines()] == ["scale"]


async def _publish_garbage(cluster: Cluster, phase: str) -> None:
    subject = cluster.bus.subjects.of("task", phase, "normal", secrets.token_hex(4))
    await cluster.bus.jetstream.publish(subject, b"\xff")
