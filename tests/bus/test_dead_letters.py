"""Dead letters: the bytes are kept, and the task still ends."""

import asyncio
from typing import Any

import pytest
from support.bus_helpers import envelope
from support.logs import capture_logs
from support.loop_harness import Phases, arrived, deliver_in_vain, hop, last, messages, put, settled
from support.raw_client import publish_raw

from loom.bus.bus import Bus
from loom.bus.hops import hop_loop as loop_module
from loom.bus.hops.delivery import DEAD_AFTER, Delivery
from loom.bus.hops.outcomes import Dead, Outcome
from loom.bus.records import records
from loom.bus.topology import INTAKE_LANES, SENSE_LANE
from loom.schemas.base import MAX_MESSAGE_BYTES, encode
from loom.schemas.envelope import Claim, Envelope, Hop, Phase, Split
from loom.schemas.record import TaskRecord
from loom.schemas.task import RunResult, Submission, TaskAd

GARBAGE = b'\xff\x00{"not": json'


async def never(_message: Any, _delivery: Delivery) -> Outcome:
    pytest.fail("must not be handled")


async def put_raw(bus: Bus, raw: bytes, subject: str | None = None) -> int:
    return (await bus.jetstream.publish(subject or bus.subjects.task("scale", "normal", "t1"), raw)).seq


def _record(env: Envelope, **fields: Any) -> TaskRecord:
    return TaskRecord(**{"task_id": env.task_id, "state": "running", "envelope": env, "admitted_at": 1.0, **fields})


async def test_undecodable_bytes_are_kept_as_they_are_with_their_facts_in_headers(bus: Bus, phases: Phases) -> None:
    await phases.start(bus, never)
    with capture_logs() as logs:
        seq = await put_raw(bus, GARBAGE)
        letter = await arrived(bus, "DEAD", bus.subjects.of("dead", "scale", "t1"))

    assert letter.data == GARBAGE
    facts = {name: letter.headers[name] for name in letter.headers if name.startswith("Loom-Dead-")}
    reason = facts.pop("Loom-Dead-reason")
    assert facts == {
        "Loom-Dead-phase": "scale",
        "Loom-Dead-task-id": "t1",
        "Loom-Dead-subject": bus.subjects.task("scale", "normal", "t1"),
        "Loom-Dead-deliveries": "1",
        "Loom-Dead-stream-seq": str(seq),
        "Loom-Dead-cut": "False",
        "Loom-Dead-trail": "",
    }
    assert reason.startswith("undecodable: ")
    assert letter.headers["Nats-Msg-Id"] == f"t1:dead:{seq}"
    await settled(bus, 0)
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["dead_letter"]


async def test_the_task_of_a_dead_letter_ends_with_the_data_of_its_record(bus: Bus, phases: Phases) -> None:
    env = envelope(attempt=2, step=7, result=RunResult(content="half"))
    await records(bus).create("t1", _record(env, claim=Claim(attempt=3)))
    await phases.start(bus, never)
    seq = await put_raw(bus, GARBAGE)

    kept = await hop(bus, "evaluate")

    ended = kept.envelope
    assert ended.error is not None
    assert ended.error.code == "dead_letter"
    assert "scale could not handle the task: undecodable" in ended.error.message
    assert (ended.ad, ended.attempt, ended.step, ended.result) == (env.ad, 3, 7, None)
    assert kept.headers["Nats-Msg-Id"] == f"t1:dead:{seq}"
    await settled(bus, 1)


def _hops(*phases: Phase) -> tuple[Hop, ...]:
    return tuple(Hop(phase=phase, instance="i", started=1, finished=2) for phase in phases)


async def test_the_trail_is_the_messages_own_and_else_the_records(bus: Bus, phases: Phases) -> None:
    async def give_up(_env: Envelope, _delivery: Delivery) -> Outcome:
        return Dead("no")

    await phases.start(bus, give_up)
    await put(bus, envelope("t1", hops=_hops("sense", "match", "scale", "match")))
    await records(bus).create("t2", _record(envelope("t2", hops=_hops("sense", "match"))))
    await put_raw(bus, GARBAGE, bus.subjects.task("scale", "normal", "t2"))

    own = await arrived(bus, "DEAD", bus.subjects.of("dead", "scale", "t1"))
    other = await arrived(bus, "DEAD", bus.subjects.of("dead", "scale", "t2"))
    assert own.headers["Loom-Dead-trail"] == "sense match scale match"
    assert other.headers["Loom-Dead-trail"] == "sense match"


async def test_a_letter_is_kept_and_the_task_ends_though_its_record_cannot_be_read(bus: Bus, phases: Phases) -> None:
    async def give_up(_env: Envelope, _delivery: Delivery) -> Outcome:
        return Dead("no")

    await bus.jetstream.publish(f"$KV.{bus.subjects.bucket('records')}.t1", b"{")
    await phases.start(bus, give_up)
    await put(bus, envelope())
    await arrived(bus, "DEAD", bus.subjects.of("dead", "scale", "t1"))
    assert (await hop(bus, "evaluate")).envelope.error is not None


async def test_a_dead_message_without_a_record_makes_only_a_letter(bus: Bus, phases: Phases) -> None:
    await phases.start(bus, never)
    await put_raw(bus, GARBAGE)
    await arrived(bus, "DEAD", bus.subjects.of("dead", "scale", "t1"))
    await settled(bus, 0)


async def test_a_message_delivered_more_than_ten_times_is_a_dead_letter_unhandled(bus: Bus, phases: Phases) -> None:
    env = envelope(step=3, attempt=2)
    await put(bus, env)
    await deliver_in_vain(bus, DEAD_AFTER)
    await phases.start(bus, never)

    letter = await arrived(bus, "DEAD", bus.subjects.of("dead", "scale", "t1"))

    assert letter.data == encode(env)
    assert letter.headers["Loom-Dead-deliveries"] == "11"
    assert letter.headers["Loom-Dead-reason"] == "delivered 10 times without being settled"
    ended = (await hop(bus, "evaluate")).envelope
    assert (ended.step, ended.attempt) == (3, 2)
    assert ended.error is not None
    assert ended.error.code == "dead_letter"
    await settled(bus, 1)


async def test_the_tenth_delivery_is_still_handled(bus: Bus, phases: Phases) -> None:
    await put(bus, envelope())
    await deliver_in_vain(bus, DEAD_AFTER - 1)
    phase = await phases.start(bus)
    await phase.count(1)
    await settled(bus, 0)
    assert await messages(bus, "DEAD") == 0


async def test_a_handler_may_make_a_message_a_dead_letter(bus: Bus, phases: Phases) -> None:
    async def give_up(_env: Envelope, _delivery: Delivery) -> Outcome:
        return Dead("the plan\r\ncannot be: 数据")

    await phases.start(bus, give_up)
    await put(bus, envelope())
    letter = await arrived(bus, "DEAD", bus.subjects.of("dead", "scale", "t1"))
    assert letter.headers["Loom-Dead-reason"] == "the plan cannot be: ??"
    error = (await hop(bus, "evaluate")).envelope.error
    assert error is not None
    assert "数据" in error.message


async def test_a_message_over_the_size_limit_is_cut_and_marked(bus: Bus, phases: Phases) -> None:
    await phases.start(bus, never)
    await put_raw(bus, b"x" * (MAX_MESSAGE_BYTES + 1))
    letter = await arrived(bus, "DEAD", bus.subjects.of("dead", "scale", "t1"))
    assert letter.data == b"x" * MAX_MESSAGE_BYTES
    assert letter.headers["Loom-Dead-cut"] == "True"
    assert "at most" in letter.headers["Loom-Dead-reason"]


async def test_an_envelope_under_anothers_id_does_not_stand_for_it(bus: Bus, phases: Phases) -> None:
    mine = envelope("t1")
    await records(bus).create("t1", _record(mine))

    async def give_up(_env: Envelope, _delivery: Delivery) -> Outcome:
        return Dead("misaddressed")

    await phases.start(bus, give_up)
    await put_raw(bus, encode(envelope("t2")))
    assert (await hop(bus, "evaluate", "t1")).envelope.ad == mine.ad
    assert await last(bus, "TASKS", bus.subjects.task("evaluate", "*", "t2")) is None


async def test_a_subject_that_names_no_task_makes_a_letter_all_the_same(bus: Bus, phases: Phases) -> None:
    await phases.start(bus, never)
    await put_raw(bus, encode(envelope())[:-1], f"{bus.subjects.namespace}.task.scale.normal.bad$id")
    letter = await arrived(bus, "DEAD", bus.subjects.of("dead", "scale", "unknown"))
    assert letter.headers["Loom-Dead-task-id"] == "bad$id"
    await settled(bus, 0)


async def test_a_subject_that_is_not_utf8_makes_a_letter_and_cuts_no_connection(
    bus: Bus, phases: Phases, nats_url: str
) -> None:
    await phases.start(bus, never)
    with capture_logs() as logs:
        subject = bus.subjects.task("scale", "normal", "t1").encode()
        publish_raw(nats_url, b"PUB %s\xff 2\r\n{]\r\n" % subject)
        letter = await arrived(bus, "DEAD", bus.subjects.of("dead", "scale", "unknown"))
    assert letter.data == b"{]"
    assert "read_loop_ended" not in {entry["event"] for entry in logs}
    await settled(bus, 0)


async def test_a_letter_that_cannot_be_kept_yet_is_not_lost(
    bus: Bus, phases: Phases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "retry_s", lambda _: 0.05)
    real, refused = bus.jetstream.publish, list[str]()

    async def refuse_once(subject: str, message: Any, **options: Any) -> Any:
        if not refused:
            refused.append(subject)
            raise ConnectionError
        return await real(subject, message, **options)

    await put_raw(bus, GARBAGE)
    monkeypatch.setattr(bus.jetstream, "publish", refuse_once)
    await phases.start(bus, never)
    letter = await arrived(bus, "DEAD", bus.subjects.of("dead", "scale", "t1"))
    assert letter.headers["Loom-Dead-deliveries"] == "2"
    await settled(bus, 0)


async def test_a_dead_letter_written_twice_is_stored_once_and_ends_its_task_once(
    bus: Bus, phases: Phases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "retry_s", lambda _: 0.05)
    await put(bus, envelope())
    await deliver_in_vain(bus, DEAD_AFTER)
    real, failed = bus.jetstream.publish, asyncio.Event()

    async def fail_after_the_end(subject: str, message: Any, **options: Any) -> Any:
        ack = await real(subject, message, **options)
        if ".task.evaluate." in subject and not failed.is_set():
            failed.set()
            raise ConnectionError
        return ack

    monkeypatch.setattr(bus.jetstream, "publish", fail_after_the_end)
    await phases.start(bus, never)
    await asyncio.wait_for(failed.wait(), 5)
    await settled(bus, 1)
    assert await messages(bus, "DEAD") == 1


# -- submissions and subtasks


def _intake(**service: Any) -> dict[str, Any]:
    return {"phase": "sense", "lanes": [(INTAKE_LANES[1], 4)], "shape": Submission, **service}


async def test_an_unreadable_submission_ends_its_task_though_it_has_no_record(bus: Bus, phases: Phases) -> None:
    await phases.start(bus, never, **_intake())
    await put_raw(bus, GARBAGE, bus.subjects.intake("public", "normal", "t1"))
    ended = (await hop(bus, "evaluate")).envelope
    assert (ended.task_id, ended.attempt) == ("t1", 1)
    assert ended.deadline == pytest.approx(bus.clock.now(), abs=30)
    assert ended.error is not None
    assert ended.error.code == "dead_letter"
    await settled(bus, 0, "INTAKE")


async def test_garbage_under_the_id_of_a_running_task_does_not_end_it(bus: Bus, phases: Phases) -> None:
    await records(bus).create("t1", _record(envelope(), submission="s1"))
    await phases.start(bus, never, **_intake())
    await put_raw(bus, GARBAGE, bus.subjects.intake("public", "normal", "t1"))
    await arrived(bus, "DEAD", bus.subjects.of("dead", "sense", "t1"))
    await settled(bus, 0, "INTAKE")
    assert await messages(bus) == 0


async def test_the_submission_that_was_admitted_ends_its_own_task(bus: Bus, phases: Phases) -> None:
    ad = TaskAd(task_id="t1", description="x")
    await records(bus).create("t1", _record(envelope(), submission="s1"))

    async def give_up(_submission: Submission, _delivery: Delivery) -> Outcome:
        return Dead("no")

    await phases.start(bus, give_up, **_intake())
    await put_raw(bus, encode(Submission(ad=ad, submission="s2")), bus.subjects.intake("public", "normal", "t1"))
    await settled(bus, 0, "INTAKE")
    assert await messages(bus) == 0
    await put_raw(bus, encode(Submission(ad=ad, submission="s1")), bus.subjects.intake("public", "normal", "t1"))
    await hop(bus, "evaluate")


async def test_a_submission_and_a_hop_of_one_sequence_and_task_are_two_letters(bus: Bus, phases: Phases) -> None:
    await phases.start(bus, never, **_intake())
    seqs = {await put_raw(bus, GARBAGE, bus.subjects.intake("public", "normal", "t1")), await put_raw(bus, GARBAGE)}
    await settled(bus, 0, "INTAKE")
    await phases.start(bus, never)
    await arrived(bus, "DEAD", bus.subjects.of("dead", "scale", "t1"))
    assert seqs == {1}
    assert await messages(bus, "DEAD") == 2


@pytest.mark.parametrize("admitted", [False, True])
async def test_a_subtask_that_dies_in_sense_ends_as_the_subtask_it_is(admitted: bool, bus: Bus, phases: Phases) -> None:
    async def give_up(_env: Envelope, _delivery: Delivery) -> Outcome:
        return Dead("no")

    child = envelope(split=Split(parent="p1", depth=1, deadline=4e9))
    if admitted:
        await records(bus).create("t1", _record(child, submission="of-p1"))
    await phases.start(bus, give_up, phase="sense", lanes=[(SENSE_LANE, 4)])
    await put(bus, child, "sense")
    ended = (await hop(bus, "evaluate")).envelope
    assert ended.split == child.split
    assert ended.error is not None


async def test_an_unreadable_subtask_ends_though_it_has_no_record(bus: Bus, phases: Phases) -> None:
    await phases.start(bus, never, phase="sense", lanes=[(SENSE_LANE, 4)])
    await put_raw(bus, GARBAGE, bus.subjects.task("sense", "normal", "t1"))
    ended = (await hop(bus, "evaluate")).envelope
    assert (ended.task_id, ended.ad.description) == ("t1", "(unreadable subtask)")


async def test_a_submission_that_dies_before_admission_keeps_the_reply_subjects_that_wait(
    bus: Bus, phases: Phases
) -> None:
    ad = TaskAd(task_id="t1", description="x")

    async def give_up(_submission: Submission, _delivery: Delivery) -> Outcome:
        return Dead("no")

    await phases.start(bus, give_up, **_intake())
    waiting = Submission(ad=ad, submission="s1", reply_to="_INBOX.client")
    await put_raw(bus, encode(waiting), bus.subjects.intake("public", "normal", "t1"))
    ended = (await hop(bus, "evaluate")).envelope
    record = await records(bus).get("t1")

    assert ended.ad == ad
    assert record is not None
    assert (record.value.state, record.value.reply_to) == ("running", ("_INBOX.client",))


async def test_a_phase_that_ends_tasks_itself_does_so(bus: Bus, phases: Phases) -> None:
    ended: list[Envelope] = []

    async def end(env: Envelope, raw: bytes) -> None:
        assert raw == GARBAGE
        ended.append(env)

    await records(bus).create("t1", _record(envelope()))
    await phases.start(bus, never, end=end)
    await put_raw(bus, GARBAGE)
    await arrived(bus, "DEAD", bus.subjects.of("dead", "scale", "t1"))
    await settled(bus, 0)
    assert [env.error.code for env in ended if env.error] == ["dead_letter"]
