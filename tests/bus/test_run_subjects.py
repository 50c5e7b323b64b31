"""The subjects on which a run's events arrive, and messages that come on any other."""

import pytest
from support.builders import ad, awarded, envelope
from support.fake_host import FakeHost, FakeRun
from support.phase_harness import Stage, quiet
from support.runs import hosts_of, watch_of
from support.wait import until

from loom.bus.bus import Bus
from loom.bus.host_directory import HostKey
from loom.bus.natsio.transport.message import Msg
from loom.phases.execute.run_inbox import EventSubjects
from loom.phases.execute.run_stream import HostSilent, Interrupt, RunStream
from loom.phases.execute.timings import ExecuteTimings
from loom.schemas.envelope import Envelope
from loom.schemas.run import RunEvent, RunRequest
from loom.schemas.task import RunResult, TaskError

REQUEST = RunRequest(task_id="t1", description="count the words", remaining_s=60)
FORGED = RunEvent(seq=0, kind="result", result=RunResult(content="forged"))


async def given(stage: Stage, owner: str = "local") -> Envelope:
    env = awarded(envelope(ad(), now=stage.bus.clock.now()), owner=owner)
    await stage.record(env)
    await stage.put("execute", env)
    return env


async def test_the_reply_subject_of_a_run_request_names_host_owner_and_replica(stage: Stage) -> None:
    one = await FakeHost(await stage.connect("node"), owner="acme", run=FakeRun.succeed).start()
    execute = await stage.phase("execute")
    env = await given(stage, owner="acme")
    assert (await stage.seen("task", phase="evaluate")).error is None
    parsed = stage.bus.subjects.parse(one.runs[0].subject)
    assert parsed is not None
    key = parsed.tokens.pop("run_key")
    assert (parsed.family, parsed.tokens) == (
        "event",
        {"owner": "acme", "host_id": "h1", "instance": execute.bus.instance},
    )
    assert len(key) == 16
    assert (await stage.read(env.task_id)).claim.owner == "acme"


@pytest.mark.parametrize(
    ("owner", "host_id", "key", "counted"),
    [("local", "h1", "guessed", "h1"), ("local", "h2", "", "h2"), ("acme", "h1", "", "acme.h1")],
    ids=["another key", "another host", "another owner"],
)
async def test_events_for_a_run_of_another_host_have_no_effect_and_are_counted(
    stage: Stage, owner: str, host_id: str, key: str, counted: str
) -> None:
    async def start(run: FakeRun) -> None:
        await run.publish("accepted")

    one = await FakeHost(await stage.connect("node"), run=start).start()
    execute = await stage.phase("execute")
    await given(stage)
    await until(lambda: one.runs, what="it runs")
    own_key = one.runs[0].subject.rpartition(".")[2]
    subject = stage.bus.subjects.of("event", owner, host_id, execute.bus.instance, key or own_key)
    await stage.bus.connection.publish(subject, FORGED)
    await until(lambda: counted in execute.bus.discards.hosts, what="it is counted")
    assert not stage.all("task", phase="evaluate")
    await one.runs[0].publish("result", result=RunResult(content="done"))
    assert (await stage.seen("task", phase="evaluate")).result == RunResult(content="done")
    assert {host: left.counts for host, left in execute.bus.discards.hosts.items()} == {counted: {"events": 1}}


async def test_events_of_another_replica_are_not_received(stage: Stage) -> None:
    execute = await stage.phase("execute")
    await stage.bus.connection.publish(stage.bus.subjects.of("event", "local", "h1", "execute-other", "key"), FORGED)
    await quiet(stage.bus, execute.bus)
    assert not execute.bus.discards.hosts


async def test_the_answer_of_the_server_that_a_host_is_absent_arrives(plain: Bus) -> None:
    timings = ExecuteTimings(absent_s=0.3, repeat_absent_s=0.1)
    async with await watch_of(plain, REQUEST, timings=timings) as watch:
        with pytest.raises(HostSilent, match="host h1 is not connected"):
            await watch.next()


async def test_each_watch_has_its_own_key_and_a_moved_runs_late_events_do_not_count(
    plain: Bus,
) -> None:
    one = await FakeHost(plain).start()
    hosts = await hosts_of(plain)
    first = RunStream(hosts, HostKey("local", "h1"), REQUEST, Interrupt())
    async with first:
        await until(lambda: one.runs, what="it is asked")
    async with first.reattach() as second:
        await until(lambda: len(one.runs) == 2, what="it is asked again")
        assert one.runs[0].subject != one.runs[1].subject
        await one.runs[0].publish("moved")
        await one.runs[1].publish("accepted")
        event = await second.next()
    assert event is not None
    assert event.kind == "accepted"
    assert not plain.discards.hosts


async def test_a_reply_after_the_last_event_is_counted_after_a_single_request(plain: Bus) -> None:
    one = await FakeHost(plain, run=FakeRun.succeed).start()
    async with await watch_of(plain, REQUEST) as watch:
        while (event := await watch.next()) is not None and not event.final:
            pass
    await one.runs[0].publish("error", error=TaskError(code="agent_failed", message="or not"))
    await until(lambda: plain.discards.hosts, what="it is counted")
    assert plain.discards.hosts["h1"].counts == {"events": 1}


async def test_closed_subjects_are_remembered_up_to_a_limit(plain: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loom.phases.execute.run_inbox.CLOSED_KEYS", 2)
    events = EventSubjects(plain)
    await events.start()
    received: list[Msg] = []
    subjects = [events.open(HostKey("local", "h1"), received.append) for _ in range(3)]
    for subject in subjects:
        events.close(subject)
        events.close(subject)
    for subject in subjects:
        await plain.connection.publish(subject, FORGED)
    await plain.requests.flush()
    assert (received, plain.discards.hosts["h1"].counts) == ([], {"events": 1})
    await events.stop()
    await events.stop()
