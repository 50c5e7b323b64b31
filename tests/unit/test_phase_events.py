"""Phase events read from the record of a task."""

import pytest
from msgspec.structs import replace
from support.builders import awarded, envelope

from loom.compat.phase_events import MOST_READS, PhaseReports, phase_events
from loom.schemas.envelope import Envelope, FailedAttempt, Hop
from loom.schemas.errors import BusUnavailable
from loom.schemas.events import PhaseEvent
from loom.schemas.record import TaskRecord
from loom.schemas.task import RunResult, TaskError


def with_hops(env: Envelope, *phases: str) -> Envelope:
    for n, phase in enumerate(phases):
        env = env.with_hop(Hop(phase=phase, instance=f"{phase}-{n}", started=n, finished=n + 0.5, step=n))  # type: ignore[arg-type]  # a phase
    return env


def record(env: Envelope, *, ended: bool = True, score: float | None = None) -> TaskRecord:
    failed = env.error is not None
    state = ("failed" if failed else "succeeded") if ended else "running"
    ended_at = 99.0 if ended else None
    return TaskRecord(
        task_id=env.task_id,
        state=state,  # type: ignore[arg-type]  # one of the states
        envelope=env,
        admitted_at=0,
        ended_at=ended_at,
        score=score,
    )


def reports(env: Envelope, **facts: float) -> list[PhaseEvent]:
    return phase_events(record(env, **facts))  # type: ignore[arg-type]  # ended, score


def test_a_running_task_shows_the_decisions_before_its_run() -> None:
    env = with_hops(awarded(envelope(now=0)), "sense", "match")

    assert [event.name for event in reports(env, ended=False)] == ["sense", "match", "scale"]


def test_a_task_without_an_award_reports_no_scale() -> None:
    env = with_hops(envelope(now=0), "sense", "match")

    assert [event.name for event in reports(env, ended=False)] == ["sense", "match"]


def test_the_last_evaluation_is_reported_though_it_made_no_hop() -> None:
    run = RunResult(content="x", prompt_tokens=1024, tool_errors=1)
    env = replace(with_hops(awarded(envelope(now=0)), "sense", "match", "execute"), result=run)
    *_, execute, evaluate = reports(env, score=0.4)

    assert (execute.name, execute.tokens, execute.duration_ms, execute.error) == ("execute", 1024, 500, "")
    assert (evaluate.name, evaluate.score, evaluate.duration_ms) == ("evaluate", 0.4, 96_500)
    assert evaluate.reward == pytest.approx(0.5 * 0.7 + 0.3 * 0.75)


def test_a_node_earns_nothing_for_a_failure_that_is_not_its_own() -> None:
    env = with_hops(awarded(envelope(now=0)), "sense", "match", "execute")
    by_node, by_others = (replace(env, error=TaskError(code=code)) for code in ("agent_failed", "cancelled"))

    assert [reports(each)[-1].reward for each in (by_node, by_others)] == [0.0, None]
    assert reports(by_others)[-1].error == "cancelled"


def test_hops_belong_to_the_attempts_that_evaluate_began() -> None:
    phases = ("sense", "match", "execute", "evaluate", "match", "execute", "evaluate", "match", "execute")
    env = replace(
        with_hops(awarded(envelope(now=0)), *phases),
        attempt=3,
        result=RunResult(content="x"),
        failed_attempts=(FailedAttempt(attempt=2, node_id="b", host_id="h", code="node_lost", tokens=5),),
    )

    assert [(event.name, event.attempt) for event in reports(env)] == [
        *(("sense", 1), ("match", 1), ("scale", 1), ("execute", 1), ("evaluate", 1)),
        *(("match", 2), ("scale", 2), ("execute", 2), ("evaluate", 2)),
        *(("match", 3), ("scale", 3), ("execute", 3), ("evaluate", 3)),
    ]
    match, _, execute, evaluate = [event for event in reports(env) if event.attempt == 2]
    assert match.node_id == execute.node_id == evaluate.node_id == "b"
    assert (execute.error, execute.tokens, evaluate.reward) == ("node_lost", 5, 0.0)
    assert {event.node_id for event in reports(env) if event.attempt == 1} == {None}


def test_a_task_whose_first_hops_were_dropped_keeps_its_last_attempt() -> None:
    env = replace(with_hops(awarded(envelope(now=0)), "match", "execute"), attempt=7, result=RunResult(content="x"))

    assert {event.attempt for event in reports(env)} == {7}


def test_a_phase_that_had_the_task_twice_in_an_attempt_is_reported_once() -> None:
    env = with_hops(awarded(envelope(now=0)), "sense", "match", "scale", "match", "execute")

    assert [(event.name, event.duration_ms) for event in reports(env, ended=False)] == [
        ("sense", 500),
        ("scale", 500),
        ("match", 1000),
        ("execute", 500),
    ]


class Watched:
    """A handle with a given or an unreadable record."""

    task_id = "t"

    def __init__(self, *records: TaskRecord | Exception) -> None:
        self.records = list(records)
        self.reads = 0

    async def record(self) -> TaskRecord:
        self.reads += 1
        found = self.records.pop(0) if len(self.records) > 1 else self.records[0]
        if isinstance(found, Exception):
            raise found
        return found


def watching(*records: TaskRecord | Exception) -> tuple[PhaseReports, Watched]:
    handle = Watched(*records)
    return PhaseReports(handle), handle  # type: ignore[arg-type]  # it has what is read of a handle


def running(attempt: int, *phases: str) -> TaskRecord:
    return record(replace(with_hops(awarded(envelope(now=0)), *phases), attempt=attempt), ended=False)


async def test_an_attempt_is_read_until_its_claim_is_stored_and_then_no_more() -> None:
    first = ("sense", "match")
    second = (*first, "execute", "evaluate", "match")
    news, handle = watching(running(1, *first), running(1, *first), running(2, *second))

    assert [event.name for event in await news.of_attempt(1)] == ["sense", "match", "scale"]
    assert await news.of_attempt(1) == []
    assert await news.of_attempt(2) == []
    assert [event.name for event in await news.of_attempt(2)] == ["execute", "evaluate", "match", "scale"]
    assert await news.of_attempt(2) == []
    assert handle.reads == 3


async def test_an_attempt_without_a_claim_is_not_read_forever() -> None:
    news, handle = watching(running(1, "sense", "match"))
    for _ in range(100):
        assert await news.of_attempt(2) == []

    assert handle.reads == MOST_READS


async def test_a_record_that_cannot_be_read_holds_up_the_progress_of_an_attempt_once() -> None:
    hops = ("sense", "match", "execute", "evaluate", "match")
    news, handle = watching(BusUnavailable("no phases answer"), running(2, *hops))
    assert [await news.of_attempt(1) for _ in range(3)] == [[]] * 3
    assert handle.reads == 1

    assert [event.attempt for event in await news.of_attempt(2)] == [1, 1, 1, 1, 1, 2, 2]
    assert handle.reads == 2


async def test_a_reported_event_is_not_reported_again_at_the_end() -> None:
    env = replace(with_hops(awarded(envelope(now=0)), "sense", "match", "execute"), result=RunResult(content="x"))
    news, _ = watching(running(1, "sense", "match"), record(env))
    await news.of_attempt(1)

    assert [event.name for event in await news.of_ended()] == ["execute", "evaluate"]
