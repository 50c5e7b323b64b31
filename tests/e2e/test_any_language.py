"""A client that uses only NATS and JSON."""

import json
from collections.abc import AsyncIterator
from typing import Any

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from support.nodes import echo, fail, node
from support.wait import until

from loom.bus.bus import Bus
from loom.runner.services import running_nodes
from loom.types import AgentNode


@pytest.fixture
async def raw(on_bus: tuple[str, str]) -> AsyncIterator[Client]:
    connection = await nats.connect(on_bus[0])
    yield connection
    await connection.close()


@pytest.fixture
async def nodes(on_bus: tuple[str, str], phases: Bus) -> AsyncIterator[list[AgentNode]]:
    hosted = [node("coder", echo, code=0.9)]
    async with running_nodes(on_bus[0], lambda: hosted, namespace=on_bus[1]):
        yield hosted


@pytest.fixture(params=["alone", "with a tap on everything"])
async def tapped(request: pytest.FixtureRequest, raw: Client, namespace: str) -> list[Msg]:
    """The messages that a tap on the namespace has received; empty when there is no tap."""
    messages: list[Msg] = []

    async def append_message(msg: Msg) -> None:
        messages.append(msg)

    if request.param != "alone":
        await raw.subscribe(f"{namespace}.>", cb=append_message)
        await raw.flush()
    return messages


async def ask(raw: Client, subject: str, body: Any = None) -> tuple[Any, dict[str, str]]:
    payload = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    msg = await raw.request(subject, payload, timeout=15)
    return json.loads(msg.data), msg.headers or {}


async def test_submit_answers_with_the_result(
    raw: Client, namespace: str, nodes: list[AgentNode], tapped: list[Msg]
) -> None:
    answer, headers = await ask(raw, f"{namespace}.submit", {"domain": "code", "description": "sort a list"})

    assert answer["state"] == "succeeded"
    assert answer["content"] == "done: sort a list"
    assert answer["node_id"] == "coder"
    assert "Nats-Service-Error-Code" not in headers


async def test_without_waiting_submit_answers_accepted_and_status_has_the_result_and_the_record(
    raw: Client, namespace: str, nodes: list[AgentNode], tapped: list[Msg]
) -> None:
    ad = {"task_id": "t-1", "domain": "code", "description": "sort", "wait": False}
    answer, _ = await ask(raw, f"{namespace}.submit", ad)
    assert answer == {"task_id": "t-1", "state": "accepted"}

    async def ended() -> Any:
        status, _ = await ask(raw, f"{namespace}.status.t-1")
        return status if status["state"] == "succeeded" else None

    result = await until(ended, what="the task succeeded")
    assert (result["task_id"], result["content"], result["node_id"]) == ("t-1", "done: sort", "coder")
    full, _ = await ask(raw, f"{namespace}.status.t-1", {"full": True})
    record = full.pop("record")
    assert full == result
    assert "reply_to" not in record
    assert record["envelope"]["result"]["content"] == "done: sort"
    assert [hop["phase"] for hop in record["envelope"]["hops"]] == ["sense", "match", "execute"]
    assert record["envelope"]["award"]["bids"][0]["node_id"] == "coder"


async def test_every_message_of_a_task_can_be_subscribed_to(
    raw: Client, namespace: str, nodes: list[AgentNode]
) -> None:
    messages: list[Msg] = []

    async def append_message(msg: Msg) -> None:
        messages.append(msg)

    await raw.subscribe(f"{namespace}.>", cb=append_message)
    await raw.flush()
    await ask(raw, f"{namespace}.submit", {"task_id": "t-2", "domain": "code", "description": "sort"})

    wanted = [
        "submit",
        "intake.public.normal.t-2",
        "task.match.normal.t-2",
        "auction.code",
        "task.execute.normal.t-2",
        "delta.public.t-2",
        "task.evaluate.normal.t-2",
        "reward.rules.local.coder.code",
        "result.public.t-2",
        "lifecycle.adapt.learned.local.coder",
    ]

    def subjects() -> list[str]:
        return [msg.subject.removeprefix(f"{namespace}.") for msg in messages]

    await until(lambda: set(wanted) <= set(subjects()), what="the whole story of the task")
    stored = [subject for subject in subjects() if subject in wanted and subject.startswith(("intake", "task"))]
    assert stored == [subject for subject in wanted if subject.startswith(("intake", "task"))]
    deltas = [json.loads(msg.data) for msg in messages if ".delta." in msg.subject]
    assert all({"task_id", "attempt", "seq", "at", "event"} == set(delta) for delta in deltas)
    assert [delta["seq"] for delta in deltas] == sorted({delta["seq"] for delta in deltas})
    assert [delta["at"] for delta in deltas if delta["event"]["type"] == "text_delta"] == [0]
    assert deltas[-1]["at"] == len("done: sort")
    [reward] = [json.loads(msg.data) for msg in messages if ".reward." in msg.subject]
    assert (reward["score"], reward["node_id"], reward["task_id"]) == (1.0, "coder", "t-2")


async def test_labels_are_in_record_result_and_reward_and_not_in_jobs(
    raw: Client, namespace: str, nodes: list[AgentNode]
) -> None:
    messages: list[Msg] = []

    async def append_message(msg: Msg) -> None:
        messages.append(msg)

    await raw.subscribe(f"{namespace}.>", cb=append_message)
    await raw.flush()
    ad = {"task_id": "t-3", "domain": "code", "description": "sort", "labels": {"tenant": "acme"}, "tools_allowed": []}
    answer, _ = await ask(raw, f"{namespace}.submit", ad)

    def bodies(family: str) -> list[Any]:
        return [json.loads(msg.data) for msg in messages if msg.subject.startswith(f"{namespace}.{family}")]

    await until(lambda: bodies("result") and bodies("reward"), what="the end of the task")
    [result], [reward], [request] = bodies("result"), bodies("reward"), bodies("run")
    assert answer["labels"] == result["labels"] == reward["labels"] == {"tenant": "acme"}
    assert request["tools_allowed"] == []
    for family in ("auction", "run", "delta"):
        assert bodies(family)
        assert "acme" not in json.dumps(bodies(family))


async def test_a_failed_task_is_answered_with_its_result_and_as_an_error(
    raw: Client, namespace: str, nodes: list[AgentNode], tapped: list[Msg]
) -> None:
    nodes[:] = [node("clumsy", fail, code=0.9)]
    answer, headers = await ask(raw, f"{namespace}.submit", {"domain": "code", "description": "sort"})

    assert headers["Nats-Service-Error-Code"] == "agent_failed"
    assert answer["state"] == "failed"
    assert answer["error"]["code"] == "agent_failed"
    assert "RuntimeError" in answer["error"]["message"]
    status, headers = await ask(raw, f"{namespace}.status.{answer['task_id']}")
    assert status == answer
    assert not headers


@pytest.mark.parametrize("family", ["status", "cancel"])
async def test_a_request_about_an_unknown_task_is_refused(
    raw: Client, namespace: str, phases: Bus, family: str
) -> None:
    answer, headers = await ask(raw, f"{namespace}.{family}.nobodys")

    assert headers["Nats-Service-Error-Code"] == answer["code"] == "unknown_task"
    assert set(answer) == {"code", "message"}


DEEP = b'{"description": "x", "context": ' + b'{"a":' * 2000 + b"1" + b"}" * 2000 + b"}"

BAD: list[tuple[str, bytes, str | None]] = [
    ("not JSON", b"sort a list", None),
    ("empty body", b"", "description"),
    ("not an object", b"[1, 2]", None),
    ("unknown field", b'{"description": "x", "descripton": "y"}', "descripton"),
    ("unknown field inside", b'{"description": "x", "accept": {"contians": ["a"]}}', "contians"),
    ("wrong type", b'{"description": 3}', "description"),
    ("empty description", b'{"description": " "}', "description"),
    ("no description", b'{"domain": "code"}', "description"),
    ("negative budget", b'{"description": "x", "token_budget": -5}', "token_budget"),
    ("unknown priority", b'{"description": "x", "priority": "urgent"}', "priority"),
    ("id with a dot", b'{"description": "x", "task_id": "a.b"}', "task_id"),
    ("id with a space", b'{"description": "x", "task_id": "a b"}', "task_id"),
    ("id ending in a newline", b'{"description": "x", "task_id": "a\\n"}', "task_id"),
    ("timeout of zero", b'{"description": "x", "timeout_s": 0}', "timeout_s"),
    ("huge number", b'{"description": "x", "timeout_s": 1e999}', "timeout_s"),
    ("300 kB description", b'{"description": "' + b"x" * 300_000 + b'"}', "description"),
    ("2,000-deep JSON", DEEP, "context"),
    ("invalid UTF-8", b'{"description": "\xff\xfe"}', "description"),
]


@pytest.mark.parametrize(("body", "field"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
async def test_bad_input_is_refused_with_its_field_and_queues_nothing(
    raw: Client, namespace: str, nodes: list[AgentNode], body: bytes, field: str | None
) -> None:
    answer, headers = await ask(raw, f"{namespace}.submit", body)

    assert answer["code"] == headers["Nats-Service-Error-Code"] == "invalid_task"
    assert answer.get("field") == field
    assert field is None or field in answer["message"]
    assert set(answer) <= {"code", "message", "field"}
    stream = await raw.jetstream().stream_info(f"{namespace.upper()}_INTAKE")
    assert stream.state.last_seq == 0
    good, _ = await ask(raw, f"{namespace}.submit", {"domain": "code", "description": "still there?"})
    assert good["state"] == "succeeded"


async def test_a_plain_responder_that_announces_itself_is_an_agent(raw: Client, namespace: str, phases: Bus) -> None:
    done: list[str] = []

    async def shout(msg: Msg) -> None:
        done.append(msg.subject)
        await msg.respond(json.loads(msg.data)["description"].upper().encode())

    await raw.subscribe(f"{namespace}.run.acme.shouter", cb=shout)
    node = {"node_id": "loud", "plain": True, "domains": [{"domain": "Shout"}]}
    await raw.publish(f"{namespace}.host.acme.shouter", json.dumps({"nodes": [node]}).encode())
    answer, _ = await ask(raw, f"{namespace}.submit", {"domain": "shout", "description": "good morning"})

    assert (answer["state"], answer["content"]) == ("succeeded", "GOOD MORNING")
    assert (answer["owner"], answer["node_id"], answer["host_id"]) == ("acme", "loud", "shouter")
    assert len(done) == 1
