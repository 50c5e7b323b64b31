from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import ad, awarded, envelope

from loom.phases.execute.claims import Claimed, Superseded, claim, ownership
from loom.schemas.envelope import Claim, Envelope
from loom.schemas.record import TaskRecord
from loom.schemas.task import TaskError


def env(attempt: int = 1, node: str = "n1", host: str = "h1") -> Envelope:
    return awarded(envelope(ad(task_id="t1"), now=0, attempt=attempt), node, host)


def record(attempt: int = 0, **facts: Any) -> TaskRecord:
    held = Claim(attempt=attempt, node_id="n1", host_id="h1", instance="first", stream_seq=7) if attempt else Claim()
    return TaskRecord(task_id="t1", envelope=env(), admitted_at=0, **{"state": "running", "claim": held, **facts})


def decided(rec: TaskRecord, message: Envelope) -> Claimed | Superseded:
    assert message.award is not None
    return claim(rec, message, message.award, "second", 9)


@pytest.mark.parametrize(
    ("held", "message", "attached"),
    [
        (0, env(1), False),
        (0, env(3), False),
        (1, env(2), False),
        (1, env(2, "n2", "h2"), False),
        (2, env(2), True),
    ],
)
def test_a_higher_attempt_is_claimed_and_the_same_one_on_its_host_is_attached(
    held: int, message: Envelope, attached: bool
) -> None:
    verdict = decided(record(held), message)
    assert isinstance(verdict, Claimed)
    assert verdict.attached is attached
    assert message.award is not None
    assert verdict.record.claim == Claim(
        attempt=message.attempt,
        node_id=message.award.node_id,
        host_id=message.award.host_id,
        instance="second",
        stream_seq=9,
    )


def test_a_claim_changes_nothing_else_in_the_record() -> None:
    before = record(reply_to=("_INBOX.a",), submission="s")
    verdict = decided(before, env())
    assert isinstance(verdict, Claimed)
    assert replace(verdict.record, claim=before.claim) == before


@pytest.mark.parametrize(
    ("rec", "message"),
    [
        (record(2), env(1)),
        (record(2), env(2, "n1", "h2")),
        (record(2), env(2, "n2", "h1")),
        (record(state="succeeded", ended_at=1.0), env(5)),
        (record(state="cancelled", ended_at=1.0), env(1)),
    ],
)
def test_a_lower_attempt_a_twin_elsewhere_and_an_ended_task_are_dropped(rec: TaskRecord, message: Envelope) -> None:
    assert isinstance(decided(rec, message), Superseded)


def test_the_same_host_id_of_another_owner_is_another_host() -> None:
    message = awarded(envelope(ad(task_id="t1"), now=0, attempt=2), owner="acme")
    assert isinstance(decided(record(2), message), Superseded)
    verdict = decided(record(1), message)
    assert isinstance(verdict, Claimed)
    assert (verdict.record.claim.owner, verdict.superseded) == ("acme", record(1).claim)


@pytest.mark.parametrize(
    ("held", "message", "superseded"),
    [
        (0, env(2, "n2", "h2"), False),
        (1, env(2), False),
        (1, env(1), False),
        (1, env(2, "n2", "h2"), True),
        (1, replace(env(2, "n2", "h2"), last_error=TaskError(code="node_lost")), True),
        (1, replace(env(2, "n2", "h2"), last_error=TaskError(code="agent_failed")), False),
        (1, replace(env(3, "n2", "h2"), last_error=TaskError(code="agent_failed")), True),
    ],
)
def test_a_claim_supersedes_the_attempt_whose_last_event_may_be_missing(
    held: int, message: Envelope, superseded: bool
) -> None:
    verdict = decided(record(held), message)
    assert isinstance(verdict, Claimed)
    assert verdict.superseded == (record(held).claim if superseded else None)


def test_a_message_of_an_ended_task_names_the_attempt_that_its_record_names() -> None:
    ended = decided(record(2, state="cancelled", ended_at=1.0), env(5))
    unclaimed = decided(record(0, state="cancelled", ended_at=1.0), env(1))
    assert isinstance(ended, Superseded)
    assert isinstance(unclaimed, Superseded)
    assert (ended.ended, unclaimed.ended) == (record(2).claim, None)


@pytest.mark.parametrize(
    ("rec", "instance", "seq", "expected"),
    [
        (record(1), "first", 7, "own"),
        (record(1), "other", 7, "other_replica"),
        (record(1), "first", 8, "other_message"),
        (record(1), "other", 8, "other_message"),
        (record(2), "first", 7, "over"),
        (record(1, state="succeeded", ended_at=1.0), "first", 7, "over"),
    ],
)
def test_only_the_holder_of_the_claim_may_report_an_error(
    rec: TaskRecord, instance: str, seq: int, expected: str
) -> None:
    assert ownership(rec, 1, instance, seq) == expected
