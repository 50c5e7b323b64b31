"""The JSON value in a model's answer."""

import json
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from loom.schemas.base import CheckedMessage, Undecodable, Unit
from loom.schemas.text.model_json import read_model_json


class Verdict(CheckedMessage, frozen=True, kw_only=True):
    score: Unit
    reason: Annotated[str, Meta(max_length=20)] = ""


GOOD = '{"score": 0.5, "reason": "a"}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}\n```\nAnything else?",
        f"The rubric {{a}} and [b]: {GOOD} as {{you}} see",
        f'{{"note": 1}} then {GOOD}',
        f'{{"score": 7}} {GOOD} {{"score": 1}}',
        f'<think>maybe {{"score": 1}}</think>{GOOD}',
        f'<THINKING>\n{{"score": 1}}\n</thinking>\n\n{GOOD}',
        f'<think>a</think><think>{{"score": 1}}</think>{GOOD}',
        f'no opening tag, {{"score": 1}} was a thought</think>{GOOD}',
        f'<think>never closed, {{"score": 1}} or {GOOD}',
        f"<think>never closed ```json\n{GOOD}\n```",
        f"\ufeff{GOOD}",
        '{"score": "0.5", "reason": "a"}',
        '{"score": 0.5, "reason": "a", "more": {"x": []}}',
        f'{{"broken": {GOOD}',
    ],
)
def test_the_value_is_found_in_any_surrounding_text(text: str) -> None:
    assert read_model_json(text, Verdict) == Verdict(score=0.5, reason="a")


def test_a_tag_within_a_text_of_the_value_is_text() -> None:
    text = '{"score": 0.5, "reason": "a <think> b"}'
    assert read_model_json(text, Verdict).reason == "a <think> b"


def test_a_field_that_is_null_is_absent() -> None:
    assert read_model_json('{"score": 0, "reason": null}', Verdict) == Verdict(score=0.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0.5",
        "[0.5]",
        "eight of ten",
        '{"score": 7}',
        '{"score": NaN}',
        '{"score": 1e999}',
        '{"score": null}',
        '{"score": 0.5, "reason": "cut he',
        '<think>only a thought: {"score": 0.5}, but then',
        '{"score": 0.5, "reason": "\\ud83d"}',
        '{"score": 0.5, "reason": "' + "x" * 21 + '"}',
        '{"score": 0.5, "deep": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"score": ' + "9" * 5000 + "}",
    ],
)
def test_text_without_such_a_value_is_undecodable(text: str) -> None:
    with pytest.raises(Undecodable):
        read_model_json(text, Verdict)


def test_the_reason_is_that_of_the_first_object() -> None:
    with pytest.raises(Undecodable, match="score"):
        read_model_json('{"score": 7} {"verdict": 1}', Verdict)


pieces = st.sampled_from(
    ["{", "}", "[", "]", '"', ":", ",", "<think>", "</think>", "```", "\\u", "\ud800", GOOD, "null"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["score", "reason", "x"]), inner),
).map(json.dumps)


@given(st.lists(pieces | values | st.text()).map("".join))
def test_any_text_gives_a_value_or_is_undecodable(text: str) -> None:
    try:
        verdict = read_model_json(text, Verdict)
    except Undecodable:
        return
    assert 0 <= verdict.score <= 1
