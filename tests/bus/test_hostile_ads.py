"""Ads and envelopes made to stop SENSE or EVALUATE, and concurrent honest tasks."""

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace
from support.bombs import (
    COSTLY_CONTENT,
    COSTLY_PATTERNS,
    COSTLY_SCHEMAS,
    LARGE_CONTENTS,
    OVERSIZED_PATTERNS,
    OVERSIZED_SCHEMAS,
)
from support.builders import ad, awarded, envelope, submission
from support.fake_host import FakeHost, FakeRun
from support.loop_time import Longest, longest_callback
from support.phase_harness import Asker, Stage
from support.wait import until

from loom.bus.topology import EVALUATE_LANE
from loom.phases.evaluate import Evaluate
from loom.phases.evaluate.timings import EvaluateTimings
from loom.phases.shared.timings import CheckTimings
from loom.runner.timings import ServiceTimings
from loom.schemas.base import encode
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Claim, Phase, Split
from loom.schemas.task import Accept, ErrorReply, RunResult, TaskResult

MOST_S = 0.2
"""CPU time of the loop's thread that one callback may use."""
ONE_ATTEMPT = ClusterConfig(max_attempts=1)
OVERSIZED = [
    *(Accept(pattern=pattern) for pattern in OVERSIZED_PATTERNS.values()),
    *(Accept(json_schema=schema) for schema in OVERSIZED_SCHEMAS.values()),
]
UNUSABLE = [Accept(pattern="("), Accept(pattern="(?P<n"), Accept(json_schema={"type": "x"})]
COSTLY = [
    *((Accept(pattern=pattern), COSTLY_CONTENT) for pattern in COSTLY_PATTERNS),
    *((Accept(json_schema=schema), content) for schema, content in (*COSTLY_SCHEMAS, *LARGE_CONTENTS)),
]


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Longest]:
    with longest_callback(monkeypatch) as longest:
        yield longest


async def back_from_execute(stage: Stage, accept: Accept | None, content: str, task_id: str, **facts: Any) -> None:
    """Put an envelope to EVALUATE that no SENSE has checked."""
    left_s = facts.pop("left_s", 600)
    env = envelope(ad(task_id=task_id, accept=accept), now=stage.bus.clock.now(), left_s=left_s, **facts)
    env = awarded(replace(env, result=RunResult(content=content)))
    await stage.record(replace(env, result=None), claim=Claim(attempt=1))
    await stage.put("evaluate", env)


@pytest.mark.slow
async def test_an_oversized_or_unusable_accept_is_refused_at_submit(stage: Stage, longest: Longest) -> None:
    await stage.phase("sense")
    for number, accept in enumerate([*OVERSIZED, *UNUSABLE]):
        asker = Asker(stage.bus)
        await asker.ask(stage.bus.subjects.submit, ad(task_id=f"t{number}", accept=accept, description="x"))
        error = await asker.error()
        assert (error.code, error.field) in {("invalid_task", "accept"), ("invalid_task", "description")}, accept
    assert longest.seconds < MOST_S, longest


@pytest.mark.slow
async def test_an_oversized_accept_put_straight_into_the_intake_is_refused_at_admission(
    stage: Stage, longest: Longest
) -> None:
    await stage.phase("sense")
    usable = [accept for accept in [*OVERSIZED, *UNUSABLE] if len(encode(accept)) < 200_000]
    for number, accept in enumerate(usable):
        task = ad(task_id=f"t{number}", accept=accept)
        await stage.bus.jetstream.publish(stage.bus.subjects.intake("public", "normal", task.task_id), submission(task))
        hop = await stage.seen("task", phase="evaluate", task_id=task.task_id)
        assert hop.error is not None, accept
        assert hop.error.code == "invalid_task"
    assert longest.seconds < MOST_S, longest


async def test_an_oversized_accept_of_a_delegated_task_is_refused_at_admission(stage: Stage, longest: Longest) -> None:
    await stage.phase("sense")
    await stage.record(envelope(ad(task_id="parent"), now=stage.bus.clock.now()))
    split = Split(parent="parent", depth=1, deadline=stage.bus.clock.now() + 60)
    for number, accept in enumerate([*OVERSIZED[::5], *UNUSABLE]):
        child = envelope(ad(task_id=f"t{number}", accept=accept), now=stage.bus.clock.now(), split=split)
        if len(encode(child)) < 200_000:
            await stage.put("sense", child)
            hop = await stage.seen("task", phase="evaluate", task_id=f"t{number}")
            assert (hop.error.code, hop.error.field) == ("invalid_task", "accept")
    assert longest.seconds < MOST_S, longest


@pytest.mark.slow
async def test_an_oversized_accept_that_reaches_evaluate_ends_its_task_without_a_reward(
    stage: Stage, longest: Longest
) -> None:
    await stage.phase("evaluate")
    usable = [accept for accept in [*OVERSIZED, *UNUSABLE] if len(encode(accept)) < 200_000]
    for number, accept in enumerate(usable):
        await back_from_execute(stage, accept, "{}", f"t{number}")
        result = await stage.seen("result", task_id=f"t{number}")
        assert (result.state, result.error.code, result.error.field) == ("failed", "invalid_task", "accept"), accept
    await stage.settled()
    assert stage.all("reward") == []
    assert longest.seconds < MOST_S, longest


@pytest.mark.slow
async def test_costly_checks_end_in_their_time_without_delay_to_concurrent_tasks(
    stage: Stage, longest: Longest
) -> None:
    await stage.phase("evaluate", ONE_ATTEMPT)
    for number, (accept, content) in enumerate(COSTLY):
        await back_from_execute(stage, accept, content, f"t{number}")
    for number in range(20):
        await back_from_execute(stage, None, "42", f"plain{number}")
        await back_from_execute(stage, Accept(pattern="^4"), "42", f"checked{number}")
    for number in range(20):
        assert (await stage.seen("result", task_id=f"plain{number}")).state == "succeeded"
    plain_at = len(stage.all("result"))
    assert plain_at < 40 + len(COSTLY)  # the costly ones are still being checked
    for name in (*(f"checked{number}" for number in range(20)), *(f"t{number}" for number in range(len(COSTLY)))):
        result = await stage.seen("result", task_id=name, within_s=120)
        assert result.state == ("succeeded" if name.startswith("checked") else result.state)
        if result.error is not None:
            assert result.error.code == "rejected_result"
    late = [each for each in stage.all("result") if each.error and "could not be checked within" in each.error.message]
    assert len(late) >= 5
    assert all(each.state == "failed" and not each.content for each in late)
    assert longest.seconds < MOST_S, longest


@pytest.mark.slow
async def test_a_result_that_cannot_be_checked_in_time_is_refused_and_tried_elsewhere(stage: Stage) -> None:
    await stage.phase("evaluate")
    await back_from_execute(stage, Accept(pattern=COSTLY_PATTERNS[0]), COSTLY_CONTENT, "t1")
    again = await stage.seen("task", phase="match", task_id="t1")
    assert (again.last_error.code, again.excluded, again.best_rejected) == ("rejected_result", ("n1",), None)
    assert again.last_error.message == "accept.pattern could not be checked within 1 s of CPU time"
    assert (await stage.seen("reward")).score == 0.0


@pytest.mark.slow
async def test_a_redelivered_bomb_ends_as_the_first_delivery_would_have(stage: Stage) -> None:
    bomb = Accept(json_schema=OVERSIZED_SCHEMAS["doubling references"])
    await back_from_execute(stage, bomb, "{}", "t1")
    await stage.reject(EVALUATE_LANE, 5)
    await stage.phase("evaluate")
    await back_from_execute(stage, None, "42", "t2")
    assert (await stage.seen("result", task_id="t1")).error.code == "invalid_task"
    assert (await stage.seen("result", task_id="t2")).state == "succeeded"


async def test_a_submitter_gets_overloaded_without_helpers_and_others_are_served(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    await stage.phase("sense")
    asker, other = Asker(stage.bus), Asker(stage.bus)
    await asker.ask(stage.bus.subjects.submit, ad(task_id="t1", accept=Accept(pattern="a")))
    assert (await asker.error()).code == "overloaded"
    await other.ask(stage.bus.subjects.submit, ad(task_id="t2", accept=Accept(contains=("a",))))
    assert (await stage.seen("task", phase="match", task_id="t2")).error is None


async def test_sense_without_helpers_admits_tasks_that_evaluate_will_check(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    await stage.phase("sense")
    task = ad(task_id="t1", accept=Accept(pattern="a"))
    await stage.bus.jetstream.publish(stage.bus.subjects.intake("public", "normal", "t1"), submission(task))
    assert (await stage.seen("task", phase="match", task_id="t1")).error is None


@pytest.mark.slow
async def test_a_result_waits_for_a_helper_and_is_never_taken_unchecked(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.timings = ServiceTimings(evaluate=EvaluateTimings(check_again_s=0.2, checks=CheckTimings(restart_s=0.1)))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        await stage.phase("evaluate")
        await back_from_execute(stage, Accept(pattern="^4"), "42", "t1")
        await back_from_execute(stage, Accept(pattern="^4"), "42", "t2", left_s=0.5)
        ended = await stage.seen("result", task_id="t2")
        assert (ended.state, ended.error.code, ended.content) == ("failed", "deadline_exceeded", "")
        assert "before the result could be checked" in ended.error.message
        assert stage.all("reward") == []
        assert not stage.all("result", task_id="t1")
    assert (await stage.seen("result", task_id="t1")).state == "succeeded"


async def test_a_message_larger_than_any_ad_is_refused_before_it_is_walked(stage: Stage, longest: Longest) -> None:
    await stage.phase("sense")
    raw = encode(submission(ad(task_id="t1")))
    huge = raw.replace(b'"description"', b'"context":{"a":[' + b"0," * 240_000 + b'0]},"description"')
    await stage.bus.jetstream.publish(stage.bus.subjects.intake("public", "normal", "t1"), huge)
    hop = await stage.seen("task", phase="evaluate", task_id="t1")
    assert (hop.error.code, hop.error.field) == ("invalid_task", "description")
    assert longest.seconds < 3 * MOST_S, longest  # half a megabyte is decoded and encoded


@pytest.mark.parametrize("text", [".", "\n", "\n\t", "\r\n", "1", "\n1", "。", "? ", "- ", "implemen", "代", "(("])
async def test_a_description_of_64_kib_is_checked_quickly(stage: Stage, longest: Longest, text: str) -> None:
    await stage.phase("sense")
    asker = Asker(stage.bus)
    size = 60_000 // len(text.encode())
    task = ad(task_id="t1", description=(text * size)[:30_000] + "x", domain="", estimated_complexity=None)
    await asker.ask(stage.bus.subjects.submit, task)
    assert (await stage.seen("task", phase="match", task_id="t1")).error is None
    assert longest.seconds < MOST_S, longest


@pytest.mark.slow
async def test_all_phases_survive_a_submitters_bombs(stage: Stage, longest: Longest) -> None:
    """An ordinary cluster: bombs among tasks that all succeed."""
    phases: tuple[Phase, ...] = ("sense", "match", "scale", "execute", "evaluate")
    for name in phases:
        await stage.phase(name, ONE_ATTEMPT)

    async def work(run: FakeRun) -> None:
        await run.succeed(COSTLY_CONTENT if run.request.description == "bomb" else "42")

    await FakeHost(await stage.connect("node"), run=work).start()
    bombs = [Accept(pattern="a{1000000}"), Accept(pattern="(" * 499 + ")" * 499), *OVERSIZED[-3:]]
    askers = [Asker(stage.bus) for _ in range(len(bombs) + 7)]
    for number, accept in enumerate(bombs):
        await askers[number].ask(stage.bus.subjects.submit, ad("bomb", task_id=f"b{number}", accept=accept))
    slow = ad("bomb", task_id="slow", accept=Accept(pattern=COSTLY_PATTERNS[0]))
    await askers[-1].ask(stage.bus.subjects.submit, slow)
    for number in range(6):
        checked = Accept(pattern="^4", json_schema={"type": "integer"}) if number % 2 else None
        await askers[len(bombs) + number].ask(stage.bus.subjects.submit, ad(task_id=f"good{number}", accept=checked))
    for asker in askers[len(bombs) : -1]:
        assert (await asker.answer(TaskResult)).state == "succeeded"
    for asker in askers[: len(bombs)]:
        assert (await asker.answer(ErrorReply)).code == "invalid_task"
    refused = await askers[-1].failure()
    assert refused.code == "rejected_result"
    assert "could not be checked within 1 s" in refused.message
    assert longest.seconds < MOST_S, longest


@pytest.mark.slow
async def test_a_phase_stops_while_bombs_are_checked(stage: Stage) -> None:
    replica = await stage.phase("evaluate")
    for number in range(4):
        await back_from_execute(stage, Accept(pattern=rf"(a|a|aa)+{number}"), COSTLY_CONTENT, f"t{number}")
    assert isinstance(replica.service, Evaluate)
    slow = replica.service._checks._slow
    await until(lambda: slow._helper, what="the first bomb is in the slow lane")
    async with asyncio.timeout(10):
        await replica.service.drain(0.1)
        await replica.bus.close()
