"""Dead letters are listed, retried and dropped; no failure loses one."""

import asyncio
import base64
from typing import Any

import pytest
from hypothesis import given
from support.bus_helpers import envelope
from support.loop_harness import messages
from support.strategies import messages as any_of

from loom.bus.bus import Bus
from loom.bus.dead_letters import admin
from loom.bus.dead_letters.admin import Letter, UnknownLetter
from loom.bus.dead_letters.write import letter_facts, letter_headers
from loom.schemas.base import MAX_MESSAGE_BYTES, CheckedMessage, decode, encode
from loom.schemas.dead_letter import DeadLetter
from loom.schemas.envelope import Envelope, Split
from loom.schemas.errors import BusUnavailable, DeadLettered, InvalidTask, LoomError, Overloaded
from loom.schemas.notices import SubtaskEnded
from loom.schemas.task import Accept, Limits, Submission, TaskAd

AD = TaskAd(
    task_id="t1",
    description="count the words",
    domain="code",
    priority="high",
    timeout_s=77,
    context={"file": "a.txt"},
    accept=Accept(contains=("words",)),
    limits=Limits(max_depth=1),
    token_budget=500,
    node_id="n1",
)
GARBAGE = b"\xff\x00{"


async def keep(bus: Bus, body: CheckedMessage | bytes, phase: str = "scale", task_id: str = "t1", **facts: Any) -> int:
    """Store a dead letter as a phase does, and return its sequence."""
    hop = (
        bus.subjects.intake("public", "normal", task_id)
        if phase == "sense"
        else bus.subjects.task(phase, "normal", task_id)
    )
    given: dict[str, Any] = {"subject": hop, "deliveries": 1, "reason": "?", **facts}
    headers = letter_headers(DeadLetter(phase=phase, task_id=task_id, **given))
    return (await bus.jetstream.publish(bus.subjects.of("dead", phase, task_id), body, headers=headers)).seq


async def submitted(bus: Bus) -> list[Submission]:
    """The messages in the intake, oldest first."""
    stream, found = bus.subjects.stream("INTAKE"), []
    for seq in range(1, await messages(bus, "INTAKE") + 1):
        message = (await bus.jetstream.api(f"STREAM.MSG.GET.{stream}", {"seq": seq}))["message"]
        found.append(decode(base64.b64decode(message["data"]), Submission))
        assert message["subject"] == bus.subjects.intake("public", found[-1].ad.priority, found[-1].ad.task_id)
    return found


@given(any_of(DeadLetter))
def test_facts_are_read_as_written_except_characters_a_header_cannot_hold(facts: DeadLetter) -> None:
    read = letter_facts(letter_headers(facts), "ns.dead.p.t")
    assert (read.deliveries, read.stream_seq, read.cut) == (facts.deliveries, facts.stream_seq, facts.cut)
    assert read.reason.split() == facts.reason.encode("ascii", "replace").decode().split()
    assert letter_facts(letter_headers(read), "ns.dead.p.t") == read


@pytest.mark.parametrize("headers", [{}, {"Loom-Dead-deliveries": "many"}, {"Loom-Dead-cut": "perhaps"}])
def test_unreadable_facts_of_a_dead_letter_are_left_out(headers: dict[str, str]) -> None:
    read = letter_facts(headers, "ns.dead.scale.t1")
    assert read == DeadLetter(phase="scale", task_id="t1", subject="", deliveries=0, reason="")


async def test_a_letter_is_read_back_with_its_facts_time_and_bytes(bus: Bus) -> None:
    whole = bytes(range(256)) * (MAX_MESSAGE_BYTES // 256)
    seq = await keep(bus, whole, deliveries=11, reason="too often", stream_seq=7, cut=True, trail="sense match")
    found = await admin.get_letter(bus, seq)

    subject = bus.subjects.task("scale", "normal", "t1")
    assert found == Letter(
        seq,
        pytest.approx(bus.clock.now(), abs=30),
        DeadLetter(
            phase="scale",
            task_id="t1",
            subject=subject,
            deliveries=11,
            reason="too often",
            stream_seq=7,
            cut=True,
            trail="sense match",
        ),
        whole,
    )
    assert await admin.list_letters(bus, 5) == [found._replace(stored_at=pytest.approx(found.stored_at, abs=1e-3))]


async def test_dead_letters_are_listed_newest_last_and_no_more_than_asked_for(bus: Bus) -> None:
    assert await admin.list_letters(bus, 5) == []
    seqs = [await keep(bus, GARBAGE, task_id=f"t{n}") for n in range(5)]
    await bus.jetstream.publish(bus.subjects.of("dead", "mine", "own"), b"put here by hand")

    listed = await admin.list_letters(bus, 3)

    assert [one.seq for one in listed] == [*seqs[-2:], seqs[-1] + 1]
    assert (listed[-1].facts.phase, listed[-1].facts.reason, listed[-1].body) == ("mine", "", b"put here by hand")


async def test_a_dropped_letter_is_gone_and_the_others_stay(bus: Bus) -> None:
    first, second = [await keep(bus, GARBAGE) for _ in range(2)]
    await admin.delete_letter(bus, first)
    for work in (admin.delete_letter, admin.get_letter, admin.retry_letter):
        with pytest.raises(UnknownLetter, match=f"no dead letter {first};"):
            await work(bus, first)
    assert [one.seq for one in await admin.list_letters(bus, 5)] == [second]


@pytest.mark.parametrize("phase", ["sense", "execute"])
async def test_a_retry_is_a_new_task_with_everything_asked_for_and_its_full_time(phase: str, bus: Bus) -> None:
    kept = Submission(ad=AD, submission="s1") if phase == "sense" else Envelope(ad=AD, deadline=1, attempt=3, step=9)
    seq = await keep(bus, kept, phase)
    new_id = await admin.retry_letter(bus, seq)

    (new,) = await submitted(bus)
    assert new_id not in {"t1", ""}
    assert new.ad == TaskAd(**{**{name: getattr(AD, name) for name in AD.__struct_fields__}, "task_id": new_id})
    assert (new.submission == "s1", new.reply_to) == (False, "")
    assert await messages(bus, "DEAD") == 0


async def test_a_letter_outlives_a_refusal_to_take_its_task(bus: Bus) -> None:
    seq = await keep(bus, envelope())
    info = await bus.jetstream.api(f"STREAM.INFO.{bus.subjects.stream('INTAKE')}")
    await bus.jetstream.api(f"STREAM.UPDATE.{bus.subjects.stream('INTAKE')}", {**info["config"], "max_msgs": 1})
    await bus.jetstream.publish(bus.subjects.intake("public", "normal", "t0"), b"t0")

    with pytest.raises(Overloaded):
        await admin.retry_letter(bus, seq)

    assert (await admin.get_letter(bus, seq)).seq == seq


async def test_two_concurrent_retries_of_a_letter_start_one_task(bus: Bus) -> None:
    seq = await keep(bus, envelope())
    ended = await asyncio.gather(*(admin.retry_letter(bus, seq) for _ in range(4)), return_exceptions=True)

    ids = {one for one in ended if not isinstance(one, BaseException)}
    assert len(ids) == 1
    assert all(isinstance(one, UnknownLetter) for one in ended if isinstance(one, BaseException))
    assert {one.ad.task_id for one in await submitted(bus)} == ids
    assert await messages(bus, "DEAD") == 0


@pytest.mark.parametrize("deleted", [False, True])
async def test_an_interrupted_retry_is_repeated_as_the_same_task(
    deleted: bool, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    seq = await keep(bus, envelope())
    real = bus.jetstream.api

    async def lose_the_answer(call: str, body: Any = None, **options: Any) -> dict[str, Any]:
        if "MSG.DELETE" not in call or deleted:
            answer = await real(call, body, **options)
        if "MSG.DELETE" in call:
            raise BusUnavailable("no answer")
        return answer

    with monkeypatch.context() as broken:
        broken.setattr(bus.jetstream, "api", lose_the_answer)
        with pytest.raises(BusUnavailable):
            await admin.retry_letter(bus, seq)
    (first,) = await submitted(bus)
    if not deleted:
        assert await admin.retry_letter(bus, seq) == first.ad.task_id
    assert {one.ad.task_id for one in await submitted(bus)} == {first.ad.task_id}
    assert await messages(bus, "DEAD") == 0


CHILD = encode(envelope(split=Split(parent="p1", depth=1, deadline=9)))
CANNOT: dict[str, tuple[bytes, dict[str, Any], type[LoomError], str]] = {
    "unreadable": (GARBAGE, {}, DeadLettered, "see `loom dead show 1`, then `loom dead rm 1`"),
    "cut": (encode(envelope())[:-9], {"cut": True}, DeadLettered, "its bytes were cut"),
    "a submission among hops": (encode(Submission(ad=AD, submission="s")), {}, DeadLettered, "no task"),
    "a subtask": (CHILD, {}, DeadLettered, "is a subtask of task p1"),
    "a notice": (
        encode(SubtaskEnded(task_id="p1", child_id="c", subtask="a")),
        {},
        DeadLettered,
        "is a notice about task p1",
    ),
    "without facts": (b"{}", {"subject": ""}, DeadLettered, "no task"),
    "an ad that breaks a rule": (encode(Envelope(ad=TaskAd(), deadline=1)), {}, InvalidTask, "description is empty"),
}


@pytest.mark.parametrize("why", CANNOT)
async def test_a_letter_that_cannot_be_retried_raises_the_reason_and_stays(why: str, bus: Bus) -> None:
    body, facts, error, message = CANNOT[why]
    seq = await keep(bus, body, **facts)
    with pytest.raises(error, match=message):
        await admin.retry_letter(bus, seq)
    assert await messages(bus, "INTAKE") == 0
    assert (await admin.get_letter(bus, seq)).body == body
