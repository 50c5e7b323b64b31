"""The stream of a run in EXECUTE: its requests, its patience, and events that come too late."""

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace as replace_fields
from itertools import count

import pytest
from support.fake_host import FakeHost, FakeRun
from support.logs import capture_logs
from support.runs import watch_of
from support.wait import until

from loom.bus.bus import Bus
from loom.phases.execute.run_stream import HostSilent, Interrupt, RunStream
from loom.phases.execute.timings import ExecuteTimings
from loom.schemas.run import RunEvent, RunRequest
from loom.schemas.task import RunResult, TaskAd

REQUEST = RunRequest(task_id="t1", description="count the words", remaining_s=60)


TIMINGS = ExecuteTimings(repeat_request_s=0.1, accept_s=1)


async def host(bus: Bus, answer: Callable[[FakeRun], Awaitable[None]] = FakeRun.succeed, *, deaf: int = 0) -> FakeHost:
    """A host that misses the first so many requests."""

    async def answer_some(run: FakeRun) -> None:
        if len(one.runs) > deaf:
            await answer(run)

    one = FakeHost(bus, run=answer_some)
    return await one.start()


async def read_events(watch: RunStream) -> list[RunEvent]:
    events = []
    async with watch:
        while (event := await watch.next()) is not None:
            events.append(event)
            if event.final:
                break
    return events


async def test_a_host_that_missed_the_request_is_asked_again_with_the_remaining_time(plain: Bus) -> None:
    one = await host(plain, deaf=2)
    kinds = [event.kind for event in await read_events(await watch_of(plain, REQUEST, timings=TIMINGS))]
    assert kinds == ["accepted", "started", "result"]
    left = [run.request.remaining_s for run in one.runs]
    assert len(left) == 3
    assert left[0] > left[1] > left[2] > 0


async def test_a_host_that_is_back_only_after_the_first_request_is_found(plain: Bus) -> None:
    """The host has no subscription at first, and the server reports no responders at once."""
    watch = await watch_of(plain, REQUEST, timings=TIMINGS)
    async with watch:
        await plain.requests.flush()
        await host(plain)
        first = await watch.next()
    assert first is not None
    assert first.kind == "accepted"


async def test_several_events_in_one_message_are_several_events(plain: Bus) -> None:
    async def at_once(run: FakeRun) -> None:
        events = [RunEvent(seq=0, kind="accepted"), RunEvent(seq=1, kind="started")]
        await plain.connection.publish(run.subject, events)
        await plain.connection.publish(
            run.subject, [*events, RunEvent(seq=2, kind="result", result=RunResult(content="done"))]
        )

    await host(plain, at_once)
    assert [event.seq for event in await read_events(await watch_of(plain, REQUEST, timings=TIMINGS))] == [0, 1, 2]


async def test_a_stop_ends_the_wait_for_the_next_event_and_earlier_events_still_count(plain: Bus) -> None:
    one = await host(plain, FakeRun.succeed)
    stop = Interrupt()
    async with await watch_of(plain, REQUEST, stop, timings=TIMINGS) as watch:
        await until(lambda: one.runs, what="it runs")
        await plain.requests.flush()
        stop.set("recalled")
        stop.set("late")
        kinds = [event.kind for _ in range(3) if (event := await watch.next()) is not None]
        assert kinds == ["accepted", "started", "result"]
        assert await watch.next() is None
        assert stop.reason == "recalled"


async def test_a_watch_that_is_over_leaves_nothing_for_the_garbage_collector(plain: Bus) -> None:
    """Phases collect garbage rarely, and the text of a task would stay until then."""
    await host(plain)
    stop = Interrupt()
    watch = await watch_of(plain, REQUEST, stop, timings=TIMINGS)
    left = weakref.ref(watch)
    gc.disable()
    try:
        await read_events(watch)
        del watch
        assert left() is None
    finally:
        gc.enable()
    stop.set("late")  # wakes no task


@pytest.mark.slow
@pytest.mark.parametrize("attached", [True, False])
async def test_only_a_run_that_may_still_go_on_is_awaited_for_three_heartbeats(plain: Bus, attached: bool) -> None:
    timings = replace_fields(TIMINGS, accept_s=0.25, silence_s=30)
    await host(plain, deaf=6)
    watch = await watch_of(plain, REQUEST, timings=timings, attached=attached)
    if attached:
        assert (await read_events(watch))[-1].kind == "result"
    else:
        with pytest.raises(HostSilent, match=r"silent for 0\.25 s"):
            await read_events(watch)


async def test_the_result_of_a_host_given_up_is_refused_and_logged(plain: Bus) -> None:
    async def stall(run: FakeRun) -> None:
        await run.publish("accepted")

    one = await host(plain, stall)
    with pytest.raises(HostSilent):
        await read_events(await watch_of(plain, REQUEST, timings=replace_fields(TIMINGS, silence_s=0.1)))
    with capture_logs() as logs:
        await one.runs[0].publish("heartbeat")
        await one.runs[0].publish("result", result=RunResult(content="late"))
        await one.runs[0].publish("result", result=RunResult(content="later still"))
        await until(lambda: len(logs) == 2, what="both are logged")
        await plain.requests.flush()
    assert (logs[0]["event"], logs[0]["task_id"], logs[0]["host_id"], logs[0]["kind"]) == (
        *("late_run_refused", "t1", "h1"),
        "result",
    )
    assert (logs[1]["event"], plain.discards.hosts["h1"].counts) == ("event_unexpected", {"events": 2})


# -- events that are lost


AD = TaskAd(task_id="child", description="part of it")
WAITING = RunEvent(seq=2, kind="waiting", ad=AD)
RESULT = RunResult(content="done")


def run_of(*events: RunEvent, first: Sequence[RunEvent]) -> Callable[[FakeRun], Awaitable[None]]:
    """A host that publishes `first` for the first request; later ones get what a host keeps of `events`."""
    requests = count()

    async def answer(run: FakeRun) -> None:
        kept = [one for one in events if one.kind != "heartbeat" and (one.seq >= run.request.from_seq or one.seq == 0)]
        await run.bus.connection.publish(run.subject, kept if next(requests) else list(first))

    return answer


ACCEPTED, STARTED = RunEvent(seq=0, kind="accepted"), RunEvent(seq=1, kind="started")
RESUMED, END = RunEvent(seq=4, kind="resumed", task_id="child"), RunEvent(seq=6, kind="result", result=RESULT)
BEAT, LATER_BEAT = RunEvent(seq=3, kind="heartbeat"), RunEvent(seq=5, kind="heartbeat")
WHOLE = (ACCEPTED, STARTED, WAITING, BEAT, RESUMED, LATER_BEAT, END)


@pytest.mark.parametrize(
    "lost",
    [{2}, {4}, {0}, {1}, {0, 1, 2}, {2, 4}, {1, 2, 4}, {3}, {2, 3, 4}],
    ids=lambda lost: "+".join(WHOLE[n].kind for n in sorted(lost)),
)
async def test_lost_events_are_asked_for_at_once_and_come_once_and_in_order(plain: Bus, lost: set[int]) -> None:
    events = WHOLE[:-1]  # the run goes on
    first = [event for event in events if event.seq not in lost]
    await host(plain, run_of(*events, first=first))
    seen: list[RunEvent] = []
    async with await watch_of(plain, REQUEST, timings=TIMINGS) as watch:
        async with asyncio.timeout(5):
            while {event.seq for event in seen if event.kind != "heartbeat"} != {0, 1, 2, 4}:
                event = await watch.next()
                assert event is not None
                seen.append(event)
    assert [event.seq for event in seen if event.kind != "heartbeat"] == [0, 1, 2, 4]


async def test_events_that_a_host_has_not_kept_do_not_stall_the_run(plain: Bus) -> None:
    events = [event for event in WHOLE if event.seq != 2]
    await host(plain, run_of(*events, first=events))
    async with asyncio.timeout(5):
        seen = await read_events(await watch_of(plain, REQUEST, timings=TIMINGS))
    assert [event.kind for event in seen][-1] == "result"


async def test_an_unanswered_request_is_repeated_each_second() -> None:
    assert ExecuteTimings.repeat_request_s == 1.0


@pytest.mark.parametrize("limit", ["MAX_RUN_EVENTS", "MAX_RUN_BYTES"])
@pytest.mark.parametrize("together", [True, False])
async def test_a_run_that_sends_too_much_is_given_up(
    plain: Bus, monkeypatch: pytest.MonkeyPatch, limit: str, together: bool
) -> None:
    monkeypatch.setattr(f"loom.phases.execute.run_stream.{limit}", 30 if limit == "MAX_RUN_EVENTS" else 1000)

    async def flood(run: FakeRun) -> None:
        events = [RunEvent(seq=n, kind="heartbeat") for n in range(1, 100)]
        await run.publish("accepted")
        for body in [events] if together else events:
            await plain.connection.publish(run.subject, body)

    await host(plain, flood)
    watch = await watch_of(plain, REQUEST, timings=TIMINGS)
    last = (await read_events(watch))[-1]
    assert last.error is not None
    assert last.error.code == "agent_failed"
    assert last.error.message.startswith("too many events")


async def test_repeating_one_number_is_counted_too(plain: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loom.phases.execute.run_stream.MAX_RUN_EVENTS", 30)

    async def flood(run: FakeRun) -> None:
        for _ in range(40):
            await plain.connection.publish(run.subject, RunEvent(seq=0, kind="accepted"))

    await host(plain, flood)
    assert (await read_events(await watch_of(plain, REQUEST, timings=TIMINGS)))[-1].kind == "error"


@pytest.mark.parametrize("unanswered", [1, 2])
async def test_a_lost_wait_is_asked_for_again_when_its_repetition_is_lost_too(plain: Bus, unanswered: int) -> None:
    """A run that waits for others publishes nothing but heartbeats."""
    requests = count()

    async def answer(run: FakeRun) -> None:
        number = next(requests)
        if number == 0:
            await plain.connection.publish(run.subject, [ACCEPTED, STARTED])
            for n in range(3, 100):
                await plain.connection.publish(run.subject, RunEvent(seq=n, kind="heartbeat"))
                await asyncio.sleep(0.05)
        elif number > unanswered:
            await plain.connection.publish(run.subject, [ACCEPTED, WAITING])

    await host(plain, answer)
    async with await watch_of(plain, REQUEST, timings=TIMINGS) as watch, asyncio.timeout(10):
        while (event := await watch.next()) is not None and event.kind != "waiting":
            pass
    assert event is not None


@pytest.mark.parametrize("garbage", [b"x" * 200, b"{}", b"[7, 8]", b"[]"])
async def test_messages_that_hold_no_event_are_counted_too(
    plain: Bus, monkeypatch: pytest.MonkeyPatch, garbage: bytes
) -> None:
    monkeypatch.setattr("loom.phases.execute.run_stream.MAX_RUN_EVENTS", 30)

    async def flood(run: FakeRun) -> None:
        await run.publish("accepted")
        for _ in range(40):
            await plain.connection.publish(run.subject, garbage)

    await host(plain, flood)
    async with asyncio.timeout(10):
        last = (await read_events(await watch_of(plain, REQUEST, timings=TIMINGS)))[-1]
    assert last.error is not None
    assert last.error.message.startswith("too many events")
