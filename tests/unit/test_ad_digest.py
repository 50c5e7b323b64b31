"""The digest that distinguishes ads under the same id."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from msgspec.structs import replace

from loom.schemas.base import decode, encode
from loom.schemas.checks.ad import check_ad
from loom.schemas.envelope import Envelope
from loom.schemas.errors import InvalidTask
from loom.schemas.record import TaskRecord
from loom.schemas.task import Accept, Limits, Submission, TaskAd, TaskError, ad_digest

AD = TaskAd(task_id="t1", description="count", domain="code")
NUMBERS = some.integers() | some.floats(allow_nan=False, allow_infinity=False)
VALUES = some.recursive(
    some.none() | some.booleans() | NUMBERS | some.text(),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text(), inner, max_size=4),
    max_leaves=12,
)


def record_of(ad: TaskAd, **facts: Any) -> TaskRecord:
    """Return the record of an ad after its way through the intake and the bucket of records."""
    sent = decode(encode(Submission(ad=ad, submission="s1")), Submission)
    envelope = Envelope(ad=sent.ad, deadline=1.0)
    wanted = {"submission": "s1", "state": "running", "envelope": envelope, **facts}
    return decode(encode(TaskRecord(task_id=ad.task_id, admitted_at=1.0, **wanted)), TaskRecord)


@given(
    context=some.dictionaries(some.text(), VALUES, max_size=4),
    timeout_s=some.integers(1, 86_400) | some.floats(1, 86_400),
    labels=some.dictionaries(some.text(max_size=8), some.text(max_size=8), max_size=4),
)
def test_a_client_and_a_record_have_the_same_digest_of_one_ad(
    context: dict[str, Any], timeout_s: float, labels: dict[str, str]
) -> None:
    ad = replace(AD, context=context, timeout_s=timeout_s, labels=labels, accept=Accept(contains=("x",)))
    try:
        checked = check_ad(ad)
    except InvalidTask:
        return
    assert record_of(ad).ad_digest == record_of(ad).to_result().ad_digest == ad_digest(checked)


@pytest.mark.parametrize(
    "change",
    [
        {"description": "count them"},
        {"domain": "law"},
        {"priority": "high"},
        {"timeout_s": 301.0},
        {"context": {"n": 1}},
        {"labels": {"team": "a"}},
        {"accept": Accept(contains=("x",))},
        {"limits": Limits(max_depth=0)},
        {"node_id": "n1"},
        {"tools_allowed": ()},
    ],
)
def test_another_ad_has_another_digest(change: dict[str, Any]) -> None:
    assert ad_digest(replace(AD, **change)) != ad_digest(AD)


def test_whether_the_client_waits_makes_no_difference() -> None:
    assert ad_digest(replace(AD, wait=False)) == ad_digest(AD)


def test_a_submission_that_could_not_be_read_has_no_digest() -> None:
    dead = Envelope(ad=AD, deadline=1.0, error=TaskError(code="dead_letter"))
    assert record_of(AD, submission="").ad_digest == ""
    assert record_of(AD, envelope=dead).ad_digest == ""
