"""Hosts in other languages: the mistakes that are tolerated in their messages, and the reports of the others."""

from collections.abc import Awaitable, Callable

import pytest
from support.builders import ad, awarded, envelope
from support.fake_host import FakeHost, FakeRun
from support.phase_harness import Stage
from support.wait import until

from loom.bus.logs.discard_reports import DiscardReport, merged_reports
from loom.bus.natsio.transport.message import Msg
from loom.bus.service_discovery import ServiceEndpoint, health_reports
from loom.phases.execute.timings import ExecuteTimings
from loom.phases.match.timings import MatchTimings
from loom.runner.timings import ServiceTimings
from loom.schemas.auction import Award, CallForBids
from loom.schemas.base import decode, encode
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope
from loom.schemas.events import TextDelta
from loom.schemas.run import RunEvent
from loom.schemas.task import RunResult

SHORT = ClusterConfig(bid_window_ms=40)
Script = Callable[[FakeRun], Awaitable[None]]


@pytest.fixture
def timings() -> ServiceTimings:
    return ServiceTimings(
        match=MatchTimings(no_offers_pause_s=0.05), execute=ExecuteTimings(accept_s=0.4, silence_s=0.6)
    )


def raws(*bodies: bytes) -> Script:
    """A run that answers with these bytes, once."""

    async def answer(run: FakeRun) -> None:
        if run.request.from_seq == 0:
            for body in bodies:
                await run.bus.connection.publish(run.subject, body)

    return answer


async def run_on(stage: Stage, script: Script) -> tuple[Envelope, DiscardReport | None]:
    """Run a task on a host of that script; return how the attempt ended, and what was left out."""
    await FakeHost(await stage.connect("node"), run=script).start()
    execute = await stage.phase("execute")
    env = awarded(envelope(ad(), now=stage.bus.clock.now()))
    await stage.record(env)
    await stage.put("execute", env)
    ended: Envelope = await stage.seen("task", phase="evaluate", within_s=10)
    return ended, execute.bus.discards.hosts.get("h1")


END = encode(RunEvent(seq=0, kind="result", result=RunResult(content="done")))
FORGIVEN: dict[str, tuple[tuple[bytes, ...], str]] = {
    "nulls": (
        (
            b'{"seq":0,"kind":"accepted","code":null,"queued":null,"event":null}',
            b'{"seq":1,"kind":"result","code":null,"call":null,"error":null,"result":{"content":"done","usd":null}}',
        ),
        "done",
    ),
    "a byte order mark": ((b"\xef\xbb\xbf" + END,), "done"),
    "a number as content": ((b'{"seq":0,"kind":"result","result":{"content":42}}',), "42"),
    "an object as content": ((b'{"seq":0,"kind":"result","result":{"content":{"a":1}}}',), '{"a":1}'),
    "counts as text": ((b'{"seq":0,"kind":"result","result":{"content":"done","prompt_tokens":"12"}}',), "done"),
}


@pytest.mark.parametrize(("bodies", "content"), FORGIVEN.values(), ids=FORGIVEN)
async def test_a_run_with_tolerated_mistakes_is_a_success(
    stage: Stage, bodies: tuple[bytes, ...], content: str
) -> None:
    ended, left_out = await run_on(stage, raws(*bodies))
    assert ended.error is None
    assert ended.result is not None
    assert (ended.result.content, left_out) == (content, None)


REFUSED: dict[str, tuple[bytes, str]] = {
    "a result of 600 kB": (b'{"seq":0,"kind":"result","result":{"content":"%s"}}' % (b"x" * 600_000), "600049 bytes"),
    "a result that is a text": (b'{"seq":0,"kind":"result","result":"done"}', "`$.result`"),
    "an unknown reason to reject": (b'{"seq":0,"kind":"rejected","code":"tired"}', "'tired'"),
    "content alone": (b'{"content":"done"}', "`seq`"),
    "a number that is not finite": (b'{"seq":0,"kind":"result","result":{"usd":1e999}}', "`$.result.usd`"),
}


@pytest.mark.parametrize(("body", "reason"), REFUSED.values(), ids=REFUSED)
async def test_a_last_event_that_cannot_be_read_fails_the_attempt_and_is_counted(
    stage: Stage, body: bytes, reason: str
) -> None:
    ended, left_out = await run_on(stage, raws(body))
    assert ended.error is not None
    assert (ended.error.code, ended.error.node_id) == ("agent_failed", "n1")
    assert reason in ended.error.message
    assert left_out is not None
    assert (left_out.counts, reason in left_out.last) == ({"events": 1}, True)


async def test_an_unknown_code_is_a_failure_of_the_agent_that_keeps_its_message(stage: Stage) -> None:
    body = b'{"seq":0,"kind":"error","error":{"code":"ValueError","message":"no such column"}}'
    ended, left_out = await run_on(stage, raws(body))
    assert ended.error is not None
    assert (ended.error.code, ended.error.message, left_out) == ("agent_failed", "no such column", None)


async def test_an_unreadable_event_on_the_way_keeps_the_run_alive_and_is_counted(stage: Stage) -> None:
    delta = encode(RunEvent(seq=2, kind="delta", event=TextDelta(text="x")))
    end = encode(RunEvent(seq=3, kind="result", result=RunResult(content="done")))
    bodies = (b'{"seq":0,"kind":"accepted"}', b'{"seq":1,"kind":"thinking"}', b"hello", delta, end)
    ended, left_out = await run_on(stage, raws(*bodies))
    assert (ended.error, [delta.seq for delta in stage.all("delta")]) == (None, [2])
    assert left_out is not None
    assert left_out.counts == {"events": 2}
    assert "malformed" in left_out.last


async def test_a_host_that_sends_no_json_is_lost_with_a_readable_reason(stage: Stage) -> None:
    ended, left_out = await run_on(stage, raws(b"hello"))
    assert ended.error is not None
    assert ended.error.code == "node_lost"
    assert "JSON is malformed" in ended.error.message
    assert left_out is not None
    assert left_out.counts == {"events": 1}


async def test_events_under_one_number_are_left_out_and_counted(stage: Stage) -> None:
    same = [encode(RunEvent(seq=0, kind="delta", event=TextDelta(text=str(n)))) for n in range(3)]
    ended, left_out = await run_on(stage, raws(b'{"seq":0,"kind":"accepted"}', *same, END))
    assert (ended.error, stage.all("delta")) == (None, [])
    assert left_out is not None
    assert left_out.counts == {"events": 3}
    assert "number 0 came again" in left_out.last


async def test_missing_events_are_requested_and_the_run_goes_on_without_those_that_never_come(stage: Stage) -> None:
    asked: list[int] = []
    kept = [RunEvent(seq=0, kind="accepted"), RunEvent(seq=3, kind="delta", event=TextDelta(text="late"))]

    async def skipping(run: FakeRun) -> None:
        asked.append(run.request.from_seq)
        events = kept if len(asked) == 1 else [*kept, RunEvent(seq=4, kind="result", result=RunResult(content="done"))]
        await run.bus.connection.publish(run.subject, events)

    ended, left_out = await run_on(stage, skipping)
    assert (ended.error, asked) == (None, [0, 1])
    assert left_out is None


async def test_the_first_of_two_last_events_wins_and_the_second_is_reported(stage: Stage) -> None:
    other = encode(RunEvent(seq=1, kind="result", result=RunResult(content="other")))
    ended, left_out = await run_on(stage, raws(b"[" + END + b"," + other + b"]"))
    assert ended.result is not None
    assert ended.result.content == "done"
    assert left_out is not None
    assert (left_out.counts, "after the last event" in left_out.last) == ({"events": 1}, True)


@pytest.mark.slow
async def test_a_reply_after_the_host_was_given_up_is_counted(stage: Stage) -> None:
    host = await FakeHost(await stage.connect("node"), run=raws(b'{"seq":0,"kind":"accepted"}')).start()
    execute = await stage.phase("execute")
    env = awarded(envelope(ad(), now=stage.bus.clock.now()))
    await stage.record(env)
    await stage.put("execute", env)
    assert (await stage.seen("task", phase="evaluate", within_s=10)).error.code == "node_lost"
    await host.bus.connection.publish(host.runs[-1].subject, END)
    await until(lambda: "h1" in execute.bus.discards.hosts, what="it is counted")
    assert "given up" in execute.bus.discards.hosts["h1"].last


# -- auctions


async def auction(stage: Stage, offers: tuple[bytes, ...]) -> tuple[Award | None, DiscardReport | None]:
    """Hold an auction at which h1 answers with these bytes; return the award and what was left out."""
    host = await FakeHost(await stage.connect("node")).start()

    async def answer(msg: Msg) -> None:
        for raw in offers:
            await host.answer(decode(msg.data, CallForBids), raw)

    host.offer = lambda _: None
    await host.bus.connection.subscribe(host.bus.subjects.of("auction", "*"), answer)
    await host.bus.requests.flush()
    match = await stage.phase("match", SHORT)
    await stage.put("match", envelope(ad(), now=stage.bus.clock.now()))
    hops = await until(
        lambda: stage.all("task", phase="execute") + stage.all("task", phase="scale"), what="the task is decided"
    )
    award = hops[0].award
    return award, match.bus.discards.hosts.get("h1")


@pytest.mark.parametrize(
    ("raw", "claim", "load"),
    [
        (b'{"bids":[{"node_id":"n1","self_rating":5}]}', 1.0, 0.0),
        (b'{"bids":[{"node_id":"n1","self_rating":-3,"load":-0.5}]}', 0.0, 0.0),
        (b'{"bids":[{"node_id":"n1","self_rating":1e300,"free":"3"}]}', 1.0, 0.0),
        (b'{"bids":[{"node_id":"n1","self_rating":%s}]}' % (b"9" * 400), 1.0, 0.0),
        (b'\xef\xbb\xbf{"decline":null,"bids":[{"node_id":"n1","free":null,"tools":null}]}', 0.5, 0.0),
    ],
    ids=["a rating of 5", "negative ones", "a great one", "an integer of 400 digits", "nulls and a byte order mark"],
)
async def test_an_offer_out_of_range_or_with_nulls_wins(stage: Stage, raw: bytes, claim: float, load: float) -> None:
    award, left_out = await auction(stage, (raw,))
    assert award is not None
    assert left_out is None
    (bid,) = award.bids
    assert (bid.node_id, bid.self_rating, bid.load) == ("n1", claim, load)


@pytest.mark.parametrize(
    ("raw", "counts", "reason"),
    [
        (b'{"decline":"tired"}', {"offers": 1}, "'tired'"),
        (b'{"bids":[{"node_id":"n1","expected_s":NaN}]}', {"offers": 1}, "malformed"),
        (b'{"bids":[{"node_id":"n1","self_rating":"high"}]}', {"bids": 1}, "`$.self_rating`"),
    ],
    ids=["an unknown reason to decline", "no JSON", "a rating in words"],
)
async def test_an_offer_that_cannot_be_read_is_counted_for_its_host(
    stage: Stage, raw: bytes, counts: dict[str, int], reason: str
) -> None:
    award, left_out = await auction(stage, (raw,))
    assert award is None
    assert left_out is not None
    assert (left_out.counts, reason in left_out.last) == (counts, True)


async def test_a_second_offer_to_a_call_is_left_out_and_counted(stage: Stage) -> None:
    host = await FakeHost(await stage.connect("node"), "h2", ("n2",), offer=lambda _: None).start()
    first, second = (b'{"bids":[{"node_id":"n1","self_rating":%s}]}' % claim for claim in (b"0.4", b"1"))
    award, left_out = await auction(stage, (first, second))
    assert award is not None
    assert [bid.self_rating for bid in award.bids] == [0.4]
    assert left_out is not None
    assert (left_out.counts, "already" in left_out.last) == ({"offers": 1}, True)
    assert host.calls


# -- reports


async def test_phases_report_the_fields_they_left_out_of_announcements(stage: Stage) -> None:
    match = await stage.phase("match")
    adapt = await stage.phase("adapt")
    for bus, name, service in ((match.bus, "match", match.service), (adapt.bus, "adapt", adapt.service)):
        presence = ServiceEndpoint(bus, (name,), bus.instance)
        presence.health[name] = service.health
        await presence.start()
    subject = stage.bus.subjects.of("host", "local", "h1")
    await stage.bus.connection.publish(subject, b'{"running":"many"}')
    await stage.bus.connection.publish(subject, b'["h1"]')
    await stage.bus.connection.publish(subject, b'\xef\xbb\xbf{"nodes":[{"node_id":"n1","slots":"4"}],"busy":null}')

    async def reported() -> bool:
        reports = await health_reports(stage.bus, within_s=0.1)
        counted = [report.left_out.get("h1", DiscardReport()).counts for each in reports.values() for report in each]
        return counted == [{"announcements": 2}] * 2

    await until(reported, what="both report both")
    reports = await health_reports(stage.bus, within_s=0.1)
    found = merged_reports(report.left_out for each in reports.values() for report in each)
    assert found["h1"].summary == "2 announcements (last: Expected `object`, got `array`)"
    assert "h1" in str(match.service._directory._presence.awaited_hosts())  # type: ignore[attr-defined]
