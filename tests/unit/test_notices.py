"""Messages on SCALE's subject: which of four types a body is."""

import json
from typing import Any

import pytest
from support.builders import ad, envelope

from loom.schemas.base import Undecodable, encode
from loom.schemas.envelope import Envelope
from loom.schemas.notices import Notice, ParentEnded, PlanTimeout, SubtaskEnded, envelope_in, read_scale_message

HOP = envelope(ad(task_id="p", context={"type": "subtask_ended", "task_id": "x"}), now=0.0)
NOTICES: list[Notice] = [
    SubtaskEnded(task_id="p", child_id="c", subtask="a"),
    PlanTimeout(envelope=HOP),
    ParentEnded(task_id="p"),
]


@pytest.mark.parametrize("notice", NOTICES, ids=lambda notice: type(notice).__name__)
def test_a_notice_is_known_by_its_type_wherever_that_stands(notice: Notice) -> None:
    body = json.loads(encode(notice))
    last = json.dumps({**{key: body[key] for key in body if key != "type"}, "type": body["type"]}).encode()

    assert next(iter(body)) == "type"
    assert notice.task_id == "p"
    assert read_scale_message(encode(notice)) == read_scale_message(last) == notice


def test_a_message_without_a_type_is_an_envelope_whatever_its_ad_contains() -> None:
    assert read_scale_message(encode(HOP)) == HOP
    assert isinstance(read_scale_message(encode(HOP)[:-1] + b',"type":""}'), Envelope)


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"\xff", b"{}", b'{"type": "split"}', b'{"type": "subtask_ended", "task_id": "p"}', b'{"type": 7}'],
)
def test_anything_else_is_unreadable(raw: bytes) -> None:
    with pytest.raises(Undecodable):
        read_scale_message(raw)
    assert envelope_in(raw) is None


@pytest.mark.parametrize(
    ("message", "carried"), [(HOP, HOP), (NOTICES[1], HOP), (NOTICES[0], None), (NOTICES[2], None)]
)
def test_only_an_envelope_and_the_timeout_of_a_plan_carry_the_task(message: Any, carried: Envelope | None) -> None:
    assert envelope_in(encode(message)) == carried
