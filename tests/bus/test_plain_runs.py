"""Plain nodes: any program that answers a request is an agent."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg as NatsMsg
from nats.micro import add_service
from nats.micro.request import Request
from support.builders import ad, awarded, envelope
from support.fake_host import FakeHost
from support.phase_harness import Stage, quiet
from support.runs import hosts_of
from support.wait import until

from loom.bus.bus import Bus
from loom.bus.host_directory import HostKey
from loom.phases.execute.plain_runs import PlainRun, read_reply
from loom.phases.execute.run_stream import Hosts, HostSilent, Interrupt
from loom.phases.execute.timings import ExecuteTimings
from loom.schemas.base import encode
from loom.schemas.envelope import Envelope
from loom.schemas.run import RunEvent, RunRequest, Stop
from loom.schemas.task import Accept, RunResult, TaskError

REQUEST = RunRequest(task_id="t1", attempt=2, description="count the words", remaining_s=60)
HOST = HostKey("local", "h1")


@pytest.fixture
async def foreign(nats_url: str) -> AsyncIterator[Client]:
    """A connection without any code of loom."""
    client = await nats.connect(nats_url)
    yield client
    await client.close()


async def respond(client: Client, subject: str, handle: Callable[[NatsMsg], Awaitable[None]]) -> list[NatsMsg]:
    requests: list[NatsMsg] = []

    async def answer(msg: NatsMsg) -> None:
        requests.append(msg)
        await handle(msg)

    await client.subscribe(subject, cb=answer)
    await client.flush()
    return requests


def replies(*bodies: bytes) -> Callable[[NatsMsg], Awaitable[None]]:
    async def reply(msg: NatsMsg) -> None:
        for body in bodies:
            await msg.respond(body)

    return reply


async def given(stage: Stage, *, max_run_s: float | None = None, **facts: Any) -> Envelope:
    env = awarded(envelope(ad(**facts), now=stage.bus.clock.now()), plain=True, max_run_s=max_run_s)
    await stage.record(env)
    await stage.put("execute", env)
    return env


async def ended(stage: Stage) -> Envelope:
    found: Envelope = await stage.seen("task", phase="evaluate")
    return found


def subject_of(stage: Stage) -> str:
    return stage.bus.subjects.of("run", "local", "h1")


# -- programs that are agents


async def test_a_program_that_just_replies_is_an_agent(stage: Stage, foreign: Client) -> None:
    requests = await respond(foreign, subject_of(stage), replies(b"42"))
    await stage.phase("execute")
    env = await given(stage, description="what is it?", labels={"a": "b"})
    done = await ended(stage)
    assert (done.error, done.result) == (None, RunResult(content="42", steps=1))
    body = json.loads(requests[0].data)
    assert body["key"] == f"{env.task_id}:1"
    assert (requests[0].headers or {})["Loom-Key"] == body["key"]
    assert (body["task_id"], body["attempt"], body["description"]) == (env.task_id, 1, "what is it?")
    assert "labels" not in body
    assert len(requests) == 1


async def test_a_nats_micro_service_is_an_agent(stage: Stage, foreign: Client) -> None:
    service = await add_service(foreign, name="words", version="1.0.0")

    async def count(request: Request) -> None:
        words = len(json.loads(request.data)["description"].split())
        await request.respond(encode(words))

    await service.add_endpoint(name="count", subject=subject_of(stage), handler=count)
    await foreign.flush()
    await stage.phase("execute")
    await given(stage, description="one two three")
    result = (await ended(stage)).result
    assert result is not None
    assert result.content == "3"
    await service.stop()


async def test_an_error_of_a_nats_micro_service_is_a_failure_of_the_agent(stage: Stage, foreign: Client) -> None:
    service = await add_service(foreign, name="words", version="1.0.0")

    async def fail(request: Request) -> None:
        await request.respond_error("500", "no such\ncolumn", data=b"42")

    await service.add_endpoint(name="count", subject=subject_of(stage), handler=fail)
    await foreign.flush()
    await stage.phase("execute")
    await given(stage)
    error = (await ended(stage)).error
    assert error is not None
    assert (error.code, error.node_id) == ("agent_failed", "n1")
    assert "500" in error.message
    assert "column" in error.message
    await service.stop()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"kind":"rejected","code":"busy"}', "node_busy"),
        (b'{"kind":"rejected","code":"unqualified"}', "node_lost"),
        (b'{"kind":"error","error":{"code":"invalid_task","message":"why"}}', "invalid_task"),
        (b'{"kind":"error","error":{"code":"cancelled","message":"why"}}', "agent_failed"),
        (b'{"kind":"result"}', "agent_failed"),
        (b'{"kind":"result","result":"text"}', "agent_failed"),
    ],
)
async def test_a_reply_that_is_a_last_event_counts_as_one(
    stage: Stage, foreign: Client, body: bytes, code: str
) -> None:
    await respond(foreign, subject_of(stage), replies(body))
    execute = await stage.phase("execute")
    await given(stage)
    error = (await ended(stage)).error
    assert error is not None
    assert error.code == code
    assert bool(execute.bus.discards.hosts) == (b'"text"' in body)


async def test_the_second_of_two_replies_is_ignored_and_counted(stage: Stage, foreign: Client) -> None:
    await respond(foreign, subject_of(stage), replies(b"first", b"second"))
    execute = await stage.phase("execute")
    await given(stage)
    result = (await ended(stage)).result
    assert result is not None
    assert result.content == "first"
    await until(lambda: execute.bus.discards.hosts, what="it is counted")
    assert execute.bus.discards.hosts["h1"].counts == {"events": 1}


async def test_content_beyond_the_limit_is_cut(stage: Stage, foreign: Client) -> None:
    await respond(foreign, subject_of(stage), replies(b"x" * 200_000))
    await stage.phase("execute")
    await given(stage)
    result = (await ended(stage)).result
    assert result is not None
    assert result.truncated
    assert len(result.content) < 64 * 1024


# -- replies


@pytest.mark.parametrize(
    ("raw", "content"),
    [
        (b'"a text"', "a text"),
        (b"plain words\n", "plain words\n"),
        (b"\xff\xfe42", "\ufffd\ufffd42"),
        (b'{"answer": 42}', '{"answer": 42}'),
        (b'{"seq":0,"kind":"accepted"}', '{"seq":0,"kind":"accepted"}'),
        (b'{"kind":"moved"}', '{"kind":"moved"}'),
        (b'{"kind":["result"]}', '{"kind":["result"]}'),
        (b"[1, 2]", "[1, 2]"),
        (b"", ""),
    ],
)
def test_any_other_body_is_the_content(raw: bytes, content: str) -> None:
    event = read_reply(raw, None, lambda _: None)
    assert event == RunEvent(seq=0, kind="result", result=RunResult(content=content, steps=1))


def test_a_json_string_stays_json_where_the_ad_has_a_schema() -> None:
    event = read_reply(b'"yes"', Accept(json_schema={"type": "string"}), lambda _: None)
    assert event.result is not None
    assert event.result.content == '"yes"'


# -- a node that is absent, slow or cancelled


async def plain_run(hosts: Hosts, interrupt: Interrupt | None = None, max_run_s: float = 30) -> RunEvent | None:
    return await PlainRun(hosts, HOST, REQUEST, interrupt or Interrupt(), max_run_s=max_run_s).last_event()


QUICK = ExecuteTimings(plain_absent_s=0.4, repeat_request_s=0.1)


async def test_an_absent_node_is_asked_again_and_lost_after_a_while(plain: Bus) -> None:
    with pytest.raises(HostSilent, match="host h1 is not connected"):
        await plain_run(await hosts_of(plain, QUICK))


async def test_a_node_that_comes_back_in_time_is_asked_again(plain: Bus, foreign: Client) -> None:
    running = asyncio.ensure_future(plain_run(await hosts_of(plain, QUICK)))
    await plain.requests.flush()
    await respond(foreign, plain.subjects.of("run", "local", "h1"), replies(b"here again"))
    event = await running
    assert event is not None
    assert event.result == RunResult(content="here again", steps=1)
    assert not plain.discards.hosts


@pytest.mark.slow
async def test_a_slow_node_is_asked_once_and_its_reply_after_the_loss_counted(plain: Bus, foreign: Client) -> None:
    async def nothing(_msg: NatsMsg) -> None:
        """Reply later."""

    requests = await respond(foreign, plain.subjects.of("run", "local", "h1"), nothing)
    with pytest.raises(HostSilent, match=r"has not replied in 0\.5 s"):
        await plain_run(await hosts_of(plain, QUICK), max_run_s=0.5)
    assert len(requests) == 1
    await requests[0].respond(b"late")
    await until(lambda: plain.discards.hosts, what="it is counted")
    assert "given up" in plain.discards.hosts["h1"].last


async def test_a_node_without_a_reply_in_its_time_is_lost_and_stopped(stage: Stage) -> None:
    one = await FakeHost(await stage.connect("node")).start()
    await stage.phase("execute")
    env = await given(stage, max_run_s=0.2)
    error = (await ended(stage)).error
    assert error is not None
    assert error.code == "node_lost"
    await until(lambda: one.stops, what="it is stopped")
    assert one.stops[0] == Stop(task_id=env.task_id, attempt=1, why="silent")


async def test_a_cancelled_run_of_a_plain_node_is_stopped_and_its_reply_not_counted(stage: Stage) -> None:
    one = await FakeHost(await stage.connect("node")).start()
    execute = await stage.phase("execute")
    env = await given(stage)
    await until(lambda: one.runs, what="it is asked")
    await stage.bus.connection.publish(stage.bus.subjects.of("cancelled", env.task_id))
    assert (await ended(stage)).error == TaskError(code="cancelled", message="the task was cancelled")
    await until(lambda: one.stops, what="it is stopped")
    await one.bus.connection.publish(one.runs[0].subject, b"stopped")
    await quiet(stage.bus, execute.bus, one.bus)
    assert not execute.bus.discards.hosts


async def test_each_execute_that_holds_the_claim_asks_once(stage: Stage) -> None:
    one = await FakeHost(await stage.connect("node")).start()
    leaving = await stage.phase("execute")
    env = await given(stage)
    await until(lambda: one.runs, what="it is asked")
    await leaving.service.drain(0)
    await stage.phase("execute")
    await until(lambda: len(one.runs) == 2, what="it is asked by another")
    await one.bus.connection.publish(one.runs[1].subject, b"42")
    result = (await ended(stage)).result
    assert result is not None
    assert result.content == "42"
    assert [run.request.attempt for run in one.runs] == [1, 1]
    assert {run.request.task_id for run in one.runs} == {env.task_id}
