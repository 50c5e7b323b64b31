"""Fields of a newer version stay where they were, in every part of a message, until that part is replaced."""

import json
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from loom.bus.records import record_from, record_version
from loom.schemas.auction import Award, ScoredBid, bids_json
from loom.schemas.base import Undecodable, decode, encode
from loom.schemas.checks.ad import parse_ad
from loom.schemas.decoding.unknown_fields import MAX_DEPTH, unknown_fields, with_unknown_fields
from loom.schemas.envelope import Claim, Envelope, FailedAttempt, Hop, RejectedResult, Spec
from loom.schemas.plan import SplitPlan, Subtask
from loom.schemas.record import TaskRecord
from loom.schemas.run import RunEvent
from loom.schemas.task import PhaseUsage, RunResult, Submission, TaskAd, TaskError

NEW: dict[str, Any] = {"new": {"a": [1, None, "x"]}}
BID = ScoredBid(node_id="n1", host_id="h1", score=0.5, self_rating=0.5, trust=0.5, load=0.25, tools=0.75)
ENVELOPE = Envelope(
    ad=TaskAd(task_id="t1", description="x", context={"free": {"any": 1}}),
    spec=Spec(complexity=0.5, domains=("code",), method="given"),
    award=Award(node_id="n1", host_id="h1", score=0.5, bids_json=bids_json(map(encode, (BID, BID)))),
    result=RunResult(content="c", usd=0.5),
    best_rejected=RejectedResult(result=RunResult(content="b"), score=0.5, node_id="n2", host_id="h2"),
    error=TaskError(code="no_bids"),
    failed_attempts=(FailedAttempt(attempt=1, node_id="n2", host_id="h2", code="node_lost"),),
    phase_usage={"sense": PhaseUsage(requests=1)},
    deadline=5.5,
    hops=(Hop(phase="sense", instance="i", started=1.5, finished=2.5),),
)
RECORD = TaskRecord(task_id="t1", state="running", envelope=ENVELOPE, claim=Claim(attempt=1), admitted_at=1.5)
PLAN = SplitPlan(parent_id="t1", subtasks=(Subtask(id="a", description="x"),), envelope=ENVELOPE)


def aged(tree: Any, *, free: bool = False) -> Any:
    """Return JSON with a further field in every object that is not a client's free JSON or a dictionary."""
    if isinstance(tree, list):
        return [aged(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    inner = {key: value if key == "context" else aged(value, free=key == "phase_usage") for key, value in tree.items()}
    return inner if free else inner | NEW


@pytest.mark.parametrize("message", [ENVELOPE, RECORD, PLAN], ids=["envelope", "record", "plan"])
def test_every_part_keeps_the_fields_it_does_not_know(message: Any) -> None:
    newer = aged(json.loads(encode(message)))
    read = decode(json.dumps(newer).encode(), type(message))
    assert json.loads(encode(read)) == newer
    assert isinstance(read, type(message))
    assert json.loads(encode(replace(read))) == newer


def test_parts_keep_theirs_in_a_message_that_is_built_of_them() -> None:
    envelope = decode(json.dumps(aged(json.loads(encode(ENVELOPE)))).encode(), Envelope)
    record = TaskRecord(task_id="t1", state="succeeded", envelope=envelope, admitted_at=1.5)
    tree = json.loads(encode(record))
    assert tree["envelope"] == aged(json.loads(encode(ENVELOPE)))
    assert "new" not in tree


def test_a_part_that_is_replaced_by_another_takes_its_fields_along() -> None:
    envelope = decode(json.dumps(aged(json.loads(encode(ENVELOPE)))).encode(), Envelope)
    tree = json.loads(encode(replace(envelope, award=Award(node_id="n9", host_id="h9"))))
    assert tree["award"] == {"node_id": "n9", "host_id": "h9"}
    assert tree["spec"] == aged(json.loads(encode(ENVELOPE.spec)))


def test_an_envelope_carries_a_records_own_fields_to_the_next_phase() -> None:
    record = with_unknown_fields(RECORD, NEW)
    known = record_version(record, 7)
    assert known is not None
    entry = record_from(decode(encode(replace(ENVELOPE, record_version=known)), Envelope))
    assert entry is not None
    assert unknown_fields(entry.value) == NEW
    assert json.loads(encode(entry.value))["new"] == NEW["new"]


def test_messages_that_are_not_forwarded_ignore_them_and_their_parts_keep_them() -> None:
    raw = {"seq": 1, "kind": "result", "result": {"content": "c", **NEW}, **NEW}
    event = decode(encode(raw), RunEvent)
    assert event.result is not None
    assert json.loads(encode(event.result)) == {"content": "c", **NEW}
    submission = decode(encode({"ad": {"task_id": "t", **NEW}, "submission": "s", **NEW}), Submission)
    assert json.loads(encode(submission.ad))["new"] == NEW["new"]


def test_nothing_else_that_is_wrong_with_a_message_is_forgiven() -> None:
    with pytest.raises(Undecodable, match=r"Expected `int`.*attempt"):
        decode(encode({**json.loads(encode(ENVELOPE)), **NEW, "attempt": "one"}), Envelope)
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(encode(NEW), type=TaskError)


def test_a_client_must_not_submit_them() -> None:
    with pytest.raises(Exception, match="unknown field `new`"):
        parse_ad(encode({"description": "x", **NEW}))


def test_a_value_that_is_nested_too_deeply_is_refused() -> None:
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = [deep]
    with pytest.raises(Undecodable, match=f"nested more than {MAX_DEPTH} levels"):
        decode(encode({"code": "x", "new": deep}), TaskError)
    assert unknown_fields(decode(encode({"code": "x", "new": deep[0]}), TaskError))


def test_the_key_that_holds_them_in_memory_is_a_field_like_others_on_the_wire() -> None:
    raw = {"code": "x", "~unknown_fields": {"code": "forged"}}
    error = decode(encode(raw), TaskError)
    assert (error.code, json.loads(encode(error))) == ("x", raw)
    ad = decode(encode({"task_id": "t", "context": raw, **NEW}), TaskAd)
    assert ad.context == raw
    assert json.loads(encode(ad)) == {"task_id": "t", "context": raw, **NEW}


def test_a_known_field_is_never_overwritten() -> None:
    error = with_unknown_fields(TaskError(code="x"), {"code": "forged", "message": "forged"})
    assert json.loads(encode(error)) == {"code": "x"}
    assert with_unknown_fields(error, {}) is error
