"""The submitter of a task: plain subjects reach all tasks, those of a submitter its own, and an id has one task."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import ad, envelope, submission
from support.bus_helpers import MessageRecorder
from support.phase_harness import Asker, Stage
from support.wait import until

from loom.bus import task_client, task_updates
from loom.bus.bus import Bus
from loom.schemas.base import encode
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import InvalidTask, UnknownTask
from loom.schemas.identity import Identity
from loom.schemas.record import TaskRecord
from loom.schemas.task import Accepted, RunResult, Submission, TaskAd, TaskResult


@pytest.fixture
async def ann(stage: Stage) -> AsyncIterator[Bus]:
    """A client with the name ann."""
    async with Bus(stage.url, namespace=stage.namespace, identity=Identity(submitter="ann")) as bus:
        yield bus


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handles ask for the status at short intervals."""
    monkeypatch.setattr(task_client, "POLL_S", 0.05)


async def stored(stage: Stage, submitter: str, task: TaskAd, **facts: Any) -> Submission:
    """Store a submission without SENSE's submit handler, as a Runtime does."""
    sent = submission(task, **facts)
    await stage.bus.jetstream.publish(stage.bus.subjects.intake(submitter, task.priority, task.task_id), sent)
    return sent


async def admitted(stage: Stage, submitter: str, task: TaskAd, **facts: Any) -> TaskRecord:
    """Submit a task, wait for its admission, and return its record."""
    await stored(stage, submitter, task, **facts)
    await stage.settled("INTAKE")
    return await stage.read(task.task_id)


async def ended(stage: Stage, submitter: str, task: TaskAd) -> TaskRecord:
    """Store the record of a task that has succeeded."""
    done = envelope(task, now=stage.bus.clock.now(), submitter=submitter, result=RunResult(content="42"))
    return await stage.record(done, submission="s1", state="succeeded", ended_at=stage.bus.clock.now())


# -- status and cancel


@pytest.mark.parametrize("family", ["status", "cancel"])
async def test_the_task_of_another_submitter_is_unknown_to_a_name(stage: Stage, family: str) -> None:
    await stage.phase("sense")
    await admitted(stage, "bob", ad(task_id="t1"))
    await admitted(stage, "public", ad(task_id="t2"))
    asker = Asker(stage.bus)
    for count, task_id in enumerate(("t1", "t2", "none"), start=1):
        await asker.ask(stage.bus.subjects.of(family, "ann", task_id))
        refused = await asker.error(count=count)
        assert refused.message == f"no task {task_id} is known; records are kept for 72 hours"
        assert refused.code == "unknown_task"
    assert {(await stage.read(task_id)).state for task_id in ("t1", "t2")} == {"running"}


@pytest.mark.parametrize("family", ["status", "cancel"])
async def test_a_queued_task_of_another_submitter_is_unknown_to_a_name(stage: Stage, family: str) -> None:
    await stage.put("match", envelope(now=stage.bus.clock.now()))
    await stage.phase("sense", ClusterConfig(max_in_flight=1))  # admits nothing more
    await stage.gate_measured()
    await stored(stage, "bob", ad(task_id="t1"))
    stranger, owner = Asker(stage.bus), Asker(stage.bus)
    await stranger.ask(stage.bus.subjects.of(family, "ann", "t1"))
    assert (await stranger.error()).code == "unknown_task"
    await owner.ask(stage.bus.subjects.of(family, "bob", "t1"))
    assert (await owner.answer(TaskResult)).state == {"status": "accepted", "cancel": "cancelled"}[family]


async def test_a_name_reaches_its_own_task_and_the_plain_subject_every_task(stage: Stage) -> None:
    await stage.phase("sense")
    subjects = stage.bus.subjects
    for count, tokens in enumerate((("ann",), ()), start=1):
        task = ad()
        await admitted(stage, "ann", task)
        asker = Asker(stage.bus)
        await asker.ask(subjects.of("status", *tokens, task.task_id))
        assert (await asker.answer(TaskResult)).state == "running"
        await asker.ask(subjects.of("cancel", *tokens, task.task_id))
        assert (await asker.answer(TaskResult, count=2)).state == "cancelled"
        assert len(stage.all("task", phase="evaluate")) == count


# -- submissions of a known id


@pytest.mark.parametrize("by", ["bob", "public", ""])
async def test_an_id_of_another_submitter_is_refused_by_either_subject_before_the_intake(stage: Stage, by: str) -> None:
    await stage.phase("sense")
    task = ad()
    before = await admitted(stage, "ann", task)
    asker = Asker(stage.bus)
    await asker.ask(stage.bus.subjects.of("submit", *((by,) if by else ())), task)
    error = await asker.error()
    assert (error.code, error.field) == ("invalid_task", "task_id")
    assert error.message == f"the id {task.task_id} is taken by a task of another submitter; choose another one"
    assert await stage.read(task.task_id) == before
    assert len(stage.all("intake")) == 1


async def test_another_ad_under_a_known_id_is_refused_and_the_same_one_answered(stage: Stage) -> None:
    await stage.phase("sense")
    task = ad(context={"n": 1})
    await ended(stage, "ann", task)
    other, again, without_waiting = Asker(stage.bus), Asker(stage.bus), Asker(stage.bus)
    submit = stage.bus.subjects.of("submit", "ann")
    await other.ask(submit, replace(task, context={"n": 2}))
    error = await other.error()
    assert (error.code, error.field) == ("invalid_task", "task_id")
    assert "is taken by another ad" in error.message
    await again.ask(submit, task)
    assert (await again.answer(TaskResult)).content == "42"
    await without_waiting.ask(submit, replace(task, wait=False))
    assert await without_waiting.answer(Accepted) == Accepted(task_id=task.task_id)


async def test_an_id_made_by_sense_is_not_looked_up(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    await stage.phase("sense")
    asked: list[Any] = []

    async def count(msg: Any) -> None:
        asked.append(msg)

    await stage.bus.connection.subscribe(f"$JS.API.STREAM.MSG.GET.KV_{stage.bus.subjects.bucket('records')}", count)
    asker = Asker(stage.bus)
    await asker.ask(stage.bus.subjects.submit, b'{"description": "x", "wait": false}')
    await asker.answer(Accepted)
    await stage.seen("task", phase="match")
    assert not asked


# -- submissions that are stored without the submit handler


@pytest.mark.parametrize(("first", "second"), [("ann", "bob"), ("public", "ann"), ("ann", "public")])
async def test_admission_refuses_an_id_of_another_submitter_which_gets_a_failed_result(
    stage: Stage, first: str, second: str
) -> None:
    await stage.phase("sense")
    task, asker = ad(), Asker(stage.bus)
    before = await admitted(stage, first, task)
    await stored(stage, second, task, reply_to=asker.inbox)
    error = await asker.error()
    assert (error.code, error.field) == ("invalid_task", "task_id")
    result = await stage.seen("result", submitter=second)
    assert (result.state, result.error.code, result.ad_digest) == ("failed", "invalid_task", "")
    assert not stage.all("result", submitter=first)
    assert await stage.read(task.task_id) == before
    assert len(stage.all("task", phase="match")) == 1


async def test_admission_refuses_another_ad_of_the_same_submitter_and_its_first_task_goes_on(stage: Stage) -> None:
    await stage.phase("sense")
    task, asker = ad(), Asker(stage.bus)
    before = await admitted(stage, "ann", task)
    await stored(stage, "ann", replace(task, description="something else"), reply_to=asker.inbox)
    assert (await asker.error()).code == "invalid_task"
    await stage.settled("INTAKE")
    assert not stage.all("result")
    assert await stage.read(task.task_id) == before


async def test_a_submission_delivered_again_belongs_to_its_own_task_with_any_ad(stage: Stage) -> None:
    """The server delivers it again when an acknowledgement was lost."""
    await stage.phase("sense")
    task = ad()
    sent = await stored(stage, "ann", task)
    await stage.settled("INTAKE")
    await stored(stage, "ann", task, submission=sent.submission)
    await stage.seen("task", phase="match", count=2)
    assert not stage.all("result")


async def test_a_known_submission_id_does_not_open_the_task_of_another_submitter(stage: Stage) -> None:
    await stage.phase("sense")
    task = ad()
    sent = await stored(stage, "ann", task)
    await stage.settled("INTAKE")
    await stored(stage, "bob", task, submission=sent.submission)
    assert (await stage.seen("result", submitter="bob")).error.code == "invalid_task"
    assert len(stage.all("task", phase="match")) == 1


async def test_bytes_under_the_id_of_another_submitters_task_do_not_end_it(stage: Stage) -> None:
    await stage.phase("sense")
    task = ad()
    sent = await stored(stage, "ann", task)
    await stage.settled("INTAKE")
    forged = encode(replace(sent, ad=ad(task_id="other")))  # the submission's own id, in a message that is dead
    await stage.bus.jetstream.publish(stage.bus.subjects.intake("bob", "normal", task.task_id), forged)
    await stage.seen("dead", phase="sense", task_id=task.task_id)
    await stage.settled("INTAKE")
    assert not stage.all("task", phase="evaluate")


async def test_a_dead_submission_ends_as_a_task_of_its_submitter(stage: Stage) -> None:
    await stage.phase("sense")
    await stage.phase("evaluate")
    await stage.bus.jetstream.publish(stage.bus.subjects.intake("ann", "normal", "t1"), b'{"ad": 7}')
    assert (await stage.seen("result", submitter="ann", task_id="t1")).error.code == "dead_letter"
    assert (await stage.read("t1")).envelope.submitter == "ann"


# -- Python's handles


async def test_a_handle_of_a_name_uses_the_subjects_of_that_name(stage: Stage, ann: Bus) -> None:
    received = MessageRecorder()
    await stage.bus.connection.subscribe(">", received)
    await stage.bus.requests.flush()
    await stage.phase("sense")
    task = ad()
    handle = await task_client.publish(ann, task)
    await stage.seen("task", phase="match")
    await handle.status()
    await handle.record()
    await handle.cancel()
    subjects = {msg.subject.removeprefix(f"{stage.namespace}.") for msg in received.messages}
    assert {f"from.ann.{family}.{task.task_id}" for family in ("status", "cancel")} <= subjects
    assert f"intake.ann.normal.{task.task_id}" in subjects
    assert not [subject for subject in subjects if subject.startswith(("status.", "cancel.", "submit"))]
    assert task_client.request_subject(ann, "submit") == f"{stage.namespace}.from.ann.submit"
    assert task_client.request_subject(stage.bus, "submit") == stage.bus.subjects.submit


async def test_a_client_of_a_name_does_not_ask_for_the_time_of_the_server(stage: Stage, ann: Bus) -> None:
    assert not ann.clock.measured
    assert stage.bus.clock.measured


async def test_a_handle_with_an_id_of_another_submitter_fails_and_that_task_goes_on(stage: Stage, ann: Bus) -> None:
    await stage.phase("sense")
    task = ad()
    before = await admitted(stage, "bob", task)
    async with task_client.published(ann, task, deltas=False, cancel_with_caller=True) as handle:
        with pytest.raises(InvalidTask, match="taken by a task of another submitter"):
            await handle.content(timeout_s=20)
        with pytest.raises(UnknownTask):
            await handle.cancel()
    assert await stage.read(task.task_id) == before


@pytest.mark.parametrize("has_ended", [True, False])
async def test_a_handle_with_an_id_of_another_ad_fails_and_that_task_goes_on(
    stage: Stage, ann: Bus, quick: None, has_ended: bool
) -> None:
    await stage.phase("sense")
    task = ad()
    before = await (ended if has_ended else admitted)(stage, "ann", task)
    async with task_client.published(
        ann, replace(task, description="another"), deltas=True, cancel_with_caller=True
    ) as one:
        with pytest.raises(InvalidTask, match="is taken by another ad") as caught:
            await one.content(timeout_s=20)
        assert (caught.value.field, caught.value.task_id) == ("task_id", task.task_id)
        with pytest.raises(InvalidTask, match="is taken by another ad"):
            await one.cancel()
    assert await stage.read(task.task_id) == before


async def test_a_result_of_the_first_ad_is_the_first_handles_alone(
    stage: Stage, ann: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stage.phase("sense")
    task = ad(timeout_s=300, context={"deep": [1, 2.0, {"x": None}]})
    first = await task_client.publish(ann, task)
    await stage.settled("INTAKE")
    again, other = await task_client.publish(ann, task), await task_client.publish(ann, replace(task, priority="high"))
    await stage.settled("INTAKE")
    record = await stage.read(task.task_id)
    done = replace(record, state="succeeded", envelope=replace(record.envelope, result=RunResult(content="42")))
    await stage.bus.connection.publish(stage.bus.subjects.of("result", "ann", task.task_id), done.to_result())
    assert [await handle.content(20) for handle in (first, again)] == ["42", "42"]
    with pytest.raises(InvalidTask):
        await other.content(20)
    assert task_updates.id_taken("x").code == "invalid_task"


async def test_a_task_handed_in_again_by_an_operator_keeps_its_submitter(stage: Stage) -> None:
    await stage.phase("sense")
    operator = await stage.connect("operator")
    handle = await task_client.publish(operator, ad(task_id="t1"), deltas=False, submitter="ann")
    await stage.settled("INTAKE")
    assert (await stage.read("t1")).envelope.submitter == "ann"
    await handle.close()
    await until(lambda: len(stage.all("intake", submitter="ann")) == 1, what="its subject has the name")
