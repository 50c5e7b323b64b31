"""The timeline of a task, from its record."""

import pytest
from hypothesis import given
from support.strategies import messages

from loom.runner.cli.views.task_timeline import attempts, submitted_at, tries, turns
from loom.schemas.envelope import MAX_HOPS, Claim, Envelope, FailedAttempt, Hop, Split
from loom.schemas.learning.reward import Reward
from loom.schemas.record import TaskRecord
from loom.schemas.task import RunResult, TaskAd, TaskError

TRIP = ("match", "scale", "execute", "evaluate")


def envelope(*phases: str, attempt: int = 1, **fields: object) -> Envelope:
    """Return an envelope, submitted at 1000, whose hops each wait 2 s and work 1 s."""
    hops = tuple(
        Hop(phase=phase, instance=f"i-{phase}", started=1002.0 + 3 * n, finished=1003.0 + 3 * n, step=n)  # type: ignore[arg-type]
        for n, phase in enumerate(phases)
    )
    ad = TaskAd(task_id="t1", description="x", timeout_s=300)
    return Envelope(ad=ad, deadline=1300.0, hops=hops, attempt=attempt, **fields)  # type: ignore[arg-type]


def record(env: Envelope, *, ended_at: float | None = None, **fields: object) -> TaskRecord:
    state = "running" if ended_at is None else "succeeded"
    given: dict[str, object] = {"state": state, "admitted_at": 1001.0, **fields}
    return TaskRecord(task_id="t1", envelope=env, ended_at=ended_at, **given)  # type: ignore[arg-type]


def reward(attempt: int, node_id: str, reason: str = "", **fields: object) -> Reward:
    given: dict[str, object] = {"source": "rules", "score": 0.0 if reason else 1.0, **fields}
    return Reward(
        reward_id=f"t1:{attempt}:{given['source']}",
        task_id="t1",
        attempt=attempt,
        node_id=node_id,
        domain_token="code",
        ended_at=1010.0,
        reason=reason,
        **given,  # type: ignore[arg-type]
    )


def test_waiting_and_working_are_separate_and_the_end_is_computed() -> None:
    shown = turns(record(envelope("sense", *TRIP[:3]), ended_at=1016.0))

    assert [(turn.phase, turn.at_s, turn.waited_s, turn.worked_s) for turn in shown] == [
        ("sense", 2.0, 2.0, 1.0),
        ("match", 5.0, 2.0, 1.0),
        ("scale", 8.0, 2.0, 1.0),
        ("execute", 11.0, 2.0, 1.0),
        ("evaluate", 12.0, None, 4.0),
    ]


def test_a_cancelled_task_was_with_the_phase_after_its_last_hop() -> None:
    shown = turns(record(envelope("sense", *TRIP[:2]), ended_at=1016.0, state="cancelled"))

    assert [turn.phase for turn in shown] == ["sense", "match", "scale", "execute"]


def test_a_running_task_has_the_turns_it_had() -> None:
    assert [turn.phase for turn in turns(record(envelope("sense", "match")))] == ["sense", "match"]
    assert turns(record(envelope())) == []


def test_a_subtask_begins_with_its_admission() -> None:
    split = Split(parent="p", depth=1, deadline=1300.0)

    assert submitted_at(record(envelope())) == 1000.0
    assert submitted_at(record(envelope(split=split))) == 1001.0


@pytest.mark.parametrize(
    ("env", "numbers"),
    [
        (envelope("sense", *TRIP[:3]), [1, 1, 1, 1]),
        (envelope("sense", *TRIP, *TRIP[:3], attempt=2), [1, 1, 1, 1, 1, 2, 2, 2]),
        (envelope("sense", *TRIP, attempt=2), [1, 1, 1, 1, 1]),  # on its way back to MATCH
        (envelope("sense", "match", "scale", "match", "scale"), [1] * 5),  # alone: SCALE returns the task
    ],
)
def test_hops_belong_to_attempts(env: Envelope, numbers: list[int]) -> None:
    assert attempts(env) == numbers


def test_with_dropped_hops_the_attempts_count_from_both_ends() -> None:
    env = Envelope(ad=TaskAd(task_id="t1", description="x"), deadline=1300.0, attempt=40)
    for step, phase in enumerate(("sense", *TRIP * 39, *TRIP[:3])):
        hop = Hop(phase=phase, instance="i", started=1.0 * step, finished=1.0 * step, step=step)  # type: ignore[arg-type]
        env = env.with_hop(hop)

    numbers = attempts(env)
    gaps = [index for index, turn in enumerate(turns(record(env))) if turn.after_gap]

    assert len(numbers) == MAX_HOPS
    assert (numbers[0], numbers[-1]) == (1, 40)
    assert gaps == [MAX_HOPS // 2]
    assert numbers[: gaps[0]] == sorted(numbers[: gaps[0]])
    assert numbers[gaps[0]] > numbers[gaps[0] - 1]


@pytest.mark.slow
@given(messages(TaskRecord))
def test_any_record_has_a_timeline(any_record: TaskRecord) -> None:
    shown = turns(any_record)

    assert all(turn.worked_s >= 0 and turn.at_s >= 0 and turn.attempt >= 1 for turn in shown)
    tries(any_record, [])


def test_attempts_are_known_from_rewards_and_from_the_record() -> None:
    failed = reward(1, "bad", "agent_failed")
    person = reward(2, "good", source="person", score=0.4)
    ended = record(
        envelope(attempt=2, result=RunResult(content="x", prompt_tokens=3, completion_tokens=4, duration_s=0.5)),
        ended_at=1020.0,
        claim=Claim(attempt=2, node_id="good"),
    )

    known = tries(ended, [failed, person])

    assert [(each.attempt, each.node, each.outcome, each.tokens) for each in known] == [
        (1, "bad", "agent_failed", 0),
        (2, "good", "succeeded", 7),
    ]


def test_failed_attempts_on_the_envelope_have_their_reasons() -> None:
    failed = FailedAttempt(attempt=1, node_id="bad", host_id="h", code="agent_failed", message="it raised", tokens=9)
    ended = record(
        envelope(attempt=2, failed_attempts=(failed,)), ended_at=1020.0, claim=Claim(attempt=2, node_id="good")
    )

    first, second = tries(ended, [reward(1, "bad", "agent_failed")])

    assert (first.node, first.outcome, first.reason, first.tokens) == ("bad", "agent_failed", "it raised", 9)
    assert (second.node, second.outcome) == ("good", "succeeded")


def test_the_running_attempt_and_a_just_lost_one_are_shown() -> None:
    claim = Claim(attempt=1, node_id="n")
    lost = envelope(attempt=2, last_error=TaskError(code="node_lost"))

    assert [each.outcome for each in tries(record(envelope(), claim=claim), [])] == ["running"]
    assert [each.outcome for each in tries(record(lost, claim=claim), [])] == ["node_lost"]
    assert tries(record(envelope()), []) == []
