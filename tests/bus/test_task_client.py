"""The client's side of a task, with the test playing the phases."""

import asyncio
from collections.abc import AsyncIterator
from threading import Thread
from typing import Any

import pytest
from msgspec.structs import asdict
from support.bus_helpers import Connect, MessageRecorder, envelope
from support.logs import capture_logs
from support.loop_harness import arrived, messages
from support.wait import until

from loom.bus import task_client, task_updates, topology
from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.bus.replies import error_headers, send_error, send_reply, send_result
from loom.bus.task_client import TaskHandle
from loom.schemas.base import decode
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import BusUnavailable, InvalidTask, LoomError, NoBids, Overloaded, UnknownTask
from loom.schemas.events import TextDelta
from loom.schemas.record import TaskRecord, TaskStatus
from loom.schemas.run import Delta
from loom.schemas.task import Accepted, RunResult, Submission, TaskAd, TaskError, TaskResult

AD = TaskAd(task_id="t1", description="count the words")


class Desk:
    """Plays SENSE: answers requests about a task with the answers a test sets."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.answers: dict[str, Any] = {}
        """family -> message or error."""
        self.asked: list[str] = []

    async def open(self) -> None:
        for family in ("status", "cancel"):
            await self.bus.connection.serve(self.bus.subjects.of(family, "*"), self._answer)

    async def _answer(self, msg: Msg) -> None:
        family = msg.subject.split(".")[1]
        self.asked.append(family)
        reply = self.answers[family]
        if isinstance(reply, LoomError):
            await send_error(self.bus, msg.reply, reply)
        else:
            await send_reply(self.bus, msg.reply, reply)


@pytest.fixture
async def desk(connect: Connect) -> Desk:
    desk = Desk(await connect(role="sense"))
    await desk.open()
    await desk.bus.requests.flush()
    return desk


@pytest.fixture
async def handle(plain: Bus) -> AsyncIterator[TaskHandle]:
    """A subscribed handle of a task that another client has published."""
    handle = TaskHandle(plain, AD)
    await handle.open(deltas=True)
    yield handle
    await handle.close()


def _result(**fields: Any) -> TaskResult:
    return TaskResult(**{"task_id": "t1", "state": "succeeded", "content": "42", **fields})


def _ended(**fields: Any) -> TaskRecord:
    return TaskRecord(
        **{
            "task_id": "t1",
            "state": "succeeded",
            "envelope": envelope(result=RunResult(content="42")),
            "admitted_at": 1.0,
            "ended_at": 2.0,
            **fields,
        }
    )


async def publish(bus: Bus, family: str, message: Any) -> None:
    await bus.connection.publish(bus.subjects.of(family, "public", "t1"), message)


def _delta(n: int, attempt: int = 1) -> Delta:
    return Delta(task_id="t1", attempt=attempt, seq=n, event=TextDelta(text=f"{attempt}.{n}"))


# -- publishing


async def test_a_published_task_is_in_the_intake_under_its_priority(bus: Bus) -> None:
    ad = TaskAd(task_id="t1", description="count", priority="high")
    handle = await task_client.publish(bus, ad)
    kept = await arrived(bus, "INTAKE", bus.subjects.intake("public", "high", "t1"))
    submission = decode(kept.data, Submission)
    assert (submission.ad, submission.reply_to) == (ad, "")
    assert kept.headers["Nats-Msg-Id"] == f"t1:{submission.submission}"
    assert (handle.task_id, handle.ad) == ("t1", ad)
    await handle.close()


async def test_one_task_published_twice_makes_two_submissions_that_sense_can_distinguish(bus: Bus) -> None:
    for _ in range(2):
        await (await task_client.publish(bus, AD)).close()
    assert await messages(bus, "INTAKE") == 2


async def test_a_bad_ad_is_refused_before_anything_is_sent(bus: Bus) -> None:
    before = len(bus.connection._nc._subs)
    with pytest.raises(InvalidTask) as caught:
        await task_client.publish(bus, TaskAd(task_id="a.b", description="x"))
    assert caught.value.field == "task_id"
    assert await messages(bus, "INTAKE") == 0
    assert len(bus.connection._nc._subs) == before


async def test_a_full_intake_is_overloaded_and_nothing_is_left_listening(plain: Bus) -> None:
    await topology.apply(plain, ClusterConfig(intake_limit=1))
    await (await task_client.publish(plain, TaskAd(description="x"))).close()
    before = len(plain.connection._nc._subs)
    with pytest.raises(Overloaded):
        await task_client.publish(plain, TaskAd(description="x"))
    assert len(plain.connection._nc._subs) == before


# -- the result


async def test_every_waiter_gets_the_result(plain: Bus, handle: TaskHandle) -> None:
    waiting = asyncio.gather(*(handle.result(5) for _ in range(3)), handle.content(5))
    await publish(plain, "result", _result())
    assert await waiting == [_result(), _result(), _result(), "42"]
    assert await handle.result() == _result()


async def test_a_failed_task_raises_the_error_of_its_code(plain: Bus, handle: TaskHandle) -> None:
    failed = _result(state="failed", content="", error=TaskError(code="no_bids", message="no node"))
    await publish(plain, "result", failed)
    assert await handle.result(5) == failed
    with pytest.raises(NoBids, match="no node") as caught:
        await handle.content(5)
    assert caught.value.task_id == "t1"


async def test_a_wait_for_a_result_may_time_out_and_begin_again(plain: Bus, handle: TaskHandle) -> None:
    with pytest.raises(TimeoutError):
        await handle.result(0.02)
    waiting = asyncio.ensure_future(handle.result(5))
    await publish(plain, "result", _result())
    assert await waiting == _result()


async def test_a_lost_result_message_is_replaced_by_a_status_request(
    desk: Desk, handle: TaskHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_client, "POLL_S", 0.05)
    desk.answers["status"] = _ended(state="running", ended_at=None).to_result()
    waiting = asyncio.ensure_future(handle.result(10))
    await until(lambda: len(desk.asked) >= 2, what="asked twice")
    assert not waiting.done()
    desk.answers["status"] = Accepted(task_id="t1")
    await until(lambda: len(desk.asked) >= 4, what="asked again")
    assert not waiting.done()
    desk.answers["status"] = _ended().to_result()
    assert (await waiting).content == "42"


async def test_a_missing_phase_is_reported_even_with_a_tap_listening(
    plain: Bus, connect: Connect, handle: TaskHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_client, "POLL_S", 0.05)
    with pytest.raises(BusUnavailable, match="loom up"):
        await handle.result(10)
    tap = await connect()
    await tap.connection.subscribe(tap.subjects.everything, MessageRecorder())
    await tap.requests.flush()
    with pytest.raises(BusUnavailable, match="loom up") as caught:
        await task_client.request(plain, plain.subjects.of("status", "t1"), timeout_s=0.1)
    assert caught.value.url == plain.connection.address


async def test_a_result_that_cannot_be_read_is_as_good_as_lost(plain: Bus, handle: TaskHandle) -> None:
    with capture_logs() as logs:
        await publish(plain, "result", b"nonsense")
        await publish(plain, "result", _result())
        assert await handle.result(5) == _result()
    assert [entry["event"] for entry in logs] == ["result_undecodable"]


async def test_an_ended_handle_has_no_subscription(plain: Bus) -> None:
    before = len(plain.connection._nc._subs)
    handle = TaskHandle(plain, AD)
    await handle.open(deltas=True)
    assert len(plain.connection._nc._subs) == before + 2
    await publish(plain, "result", _result())
    await handle.result(5)
    assert len(plain.connection._nc._subs) == before
    await handle.close()
    await handle.close()


# -- progress


async def seen(handle: TaskHandle) -> list[str]:
    async with asyncio.timeout(10):
        return [delta.event.text async for delta in handle.events() if isinstance(delta.event, TextDelta)]


async def test_progress_is_yielded_in_order_and_once_until_the_task_ends(plain: Bus, handle: TaskHandle) -> None:
    watching = asyncio.ensure_future(seen(handle))
    for n in (0, 1, 1, 0, 2, 5):  # repeated on re-attaching, and one lost
        await publish(plain, "delta", _delta(n))
    await plain.requests.flush()
    await publish(plain, "result", _result())
    assert await watching == ["1.0", "1.1", "1.2", "1.5"]


async def test_a_later_attempt_restarts_progress_and_an_earlier_one_is_over(plain: Bus, handle: TaskHandle) -> None:
    watching = asyncio.ensure_future(seen(handle))
    for delta in (_delta(0), _delta(1), _delta(0, 2), _delta(2, 1), _delta(1, 2)):
        await publish(plain, "delta", delta)
    await plain.requests.flush()
    await publish(plain, "result", _result())
    assert await watching == ["1.0", "1.1", "2.0", "2.1"]


async def test_progress_made_before_the_iteration_is_not_lost(plain: Bus, handle: TaskHandle) -> None:
    for n in range(3):
        await publish(plain, "delta", _delta(n))
    await plain.requests.flush()
    await publish(plain, "result", _result())
    await handle.result(5)
    assert await seen(handle) == ["1.0", "1.1", "1.2"]
    assert await seen(handle) == []


async def test_progress_ends_for_a_slow_reader_whose_buffer_is_full(
    plain: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_updates, "BUFFER", 4)
    handle = TaskHandle(plain, AD)
    await handle.open(deltas=True)
    stream = handle.events()
    await publish(plain, "delta", _delta(0))
    first = await anext(stream)
    for n in range(1, 20):
        await publish(plain, "delta", _delta(n))
    await plain.requests.flush()
    await publish(plain, "result", _result())
    await handle.result(5)
    async with asyncio.timeout(5):
        rest = [delta.seq async for delta in stream]
    assert first.seq == 0
    assert rest == sorted(rest)
    assert len(rest) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_reader_gets_all_progress_published_while_its_process_was_busy(
    nats_url: str, namespace: str, loop: str
) -> None:
    count = 4 * task_updates.BUFFER

    async def speak() -> None:
        async with Bus(nats_url, namespace=namespace) as bus:
            for n in range(count):
                await publish(bus, "delta", _delta(n))
            await publish(bus, "result", _result())
            await bus.requests.flush()

    async def listen() -> int:
        async with Bus(nats_url, namespace=namespace) as bus:
            handle = TaskHandle(bus, AD)
            await handle.open(deltas=True)
            await bus.requests.flush()
            speaker = Thread(target=asyncio.run, args=(speak(),))
            speaker.start()
            speaker.join()  # in the meantime this loop reads nothing
            return len(await seen(handle))

    factory = pytest.importorskip(loop).new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        assert runner.run(listen()) == count


async def test_an_iteration_left_early_leaves_the_task_alone(plain: Bus, handle: TaskHandle) -> None:
    await publish(plain, "delta", _delta(0))
    async for delta in (stream := handle.events()):
        assert delta.seq == 0
        break
    await stream.aclose()  # type: ignore[attr-defined]
    waiting = asyncio.ensure_future(handle.result(5))
    await publish(plain, "result", _result())
    assert await waiting == _result()


async def test_progress_ends_quietly_when_no_phase_answers_and_the_result_raises_the_reason(
    handle: TaskHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_client, "POLL_S", 0.05)
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
    assert await seen(handle) == []
    with pytest.raises(BusUnavailable):
        await handle.result(5)
    assert complaints == []


# -- status and cancel


async def test_the_status_is_a_result_and_the_record_is_absent_while_the_task_waits(
    desk: Desk, handle: TaskHandle
) -> None:
    desk.answers["status"] = TaskStatus(**asdict(_ended().to_result()), record=_ended())
    assert (await handle.status(), await handle.record()) == (_ended().to_result(), _ended())
    desk.answers["status"] = Accepted(task_id="t1")
    assert (await handle.status(), await handle.record()) == (TaskResult(task_id="t1", state="accepted"), None)


async def test_the_status_of_a_failed_task_is_a_result_too(desk: Desk, handle: TaskHandle) -> None:
    failed = _result(state="failed", error=TaskError(code="no_bids", message="no node has bid"))
    desk.answers["status"] = failed
    assert await handle.status() == failed


async def test_an_unknown_task_raises_unknown_task(desk: Desk, handle: TaskHandle) -> None:
    desk.answers["status"] = desk.answers["cancel"] = UnknownTask("no task t1", task_id="t1")
    with pytest.raises(UnknownTask, match="no task t1") as caught:
        await handle.status()
    assert caught.value.task_id == "t1"
    with pytest.raises(UnknownTask):
        await handle.cancel()


async def test_cancelling_returns_the_result(desk: Desk, handle: TaskHandle) -> None:
    desk.answers["cancel"] = _ended(state="cancelled").to_result()
    assert await handle.cancel() == _ended(state="cancelled").to_result()
    assert desk.asked == ["cancel"]


async def test_an_id_that_is_not_a_token_is_refused(plain: Bus) -> None:
    with pytest.raises(InvalidTask):
        await task_client.status(plain, "a.b")


# -- answers


async def test_a_failed_task_is_answered_with_its_result_and_error_headers(plain: Bus) -> None:
    error = TaskError(code="cancelled", message="someone\ncancelled\r\nthe task: 代码")
    record = _ended(state="cancelled", envelope=envelope(error=error))
    received: list[Msg] = []
    reply = plain.requests.open_inbox(received.append)
    await send_result(plain, reply, record)
    await plain.requests.flush()
    (msg,) = received
    assert msg.headers is not None
    assert msg.headers["Nats-Service-Error-Code"] == "cancelled"
    assert msg.headers["Nats-Service-Error"] == "someone cancelled the task: ??"
    assert decode(msg.data, TaskResult) == record.to_result()

    await send_result(plain, reply, _ended())
    await plain.requests.flush()
    assert decode(received[1].data, TaskResult).content == "42"
    assert not received[1].headers


def test_an_error_header_is_short_plain_text_on_one_line() -> None:
    headers = error_headers("invalid_task", "é" * 1000)
    assert headers["Nats-Service-Error"] == "?" * 300
