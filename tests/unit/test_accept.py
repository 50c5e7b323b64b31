import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.phases.accept import complaint, unusable
from loom.schemas.task import Accept

NUMBERED = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("content", "accept", "said"),
    [
        ("42", None, None),
        ("", None, "empty"),
        (" \n\t", None, "empty"),
        ("the answer is 42", Accept(contains=("42", "answer")), None),
        ("the answer is 43", Accept(contains=("42",)), "does not contain '42'"),
        ("order 66", Accept(pattern=r"\border \d+"), None),
        ("order six", Accept(pattern=r"\border \d+"), "does not match"),
        ('{"n": 1}', Accept(json_schema=NUMBERED), None),
        ('{"n": "1"}', Accept(json_schema=NUMBERED), "does not fit"),
        ("n is 1", Accept(json_schema=NUMBERED), "is not JSON"),
        ('{"n": 1}', Accept(contains=("n",), pattern="2", json_schema=NUMBERED), "does not match"),
    ],
)
def test_each_rule_says_what_is_wrong(content: str, accept: Accept | None, said: str | None) -> None:
    found = complaint(content, accept)
    assert (found is None) if said is None else (found is not None and said in found)


@pytest.mark.parametrize(
    "content",
    [
        "I'm sorry, but I can't help with that.",
        "I cannot assist with this request.",
        "Sorry, I am unable to comply with that.",
        "As an AI language model, I cannot provide medical advice.",
        "Unfortunately, I can’t complete this task.",  # noqa: RUF001 - as models write it
    ],
)
def test_a_refusal_is_no_answer(content: str) -> None:
    assert complaint(content, None) == "the agent refuses the task"


@pytest.mark.parametrize(
    "content",
    [
        "The letter begins: I'm sorry, but I can't help with that.",
        "I can help with that: 42.",
        "I cannot recommend this film enough.",
        "Sorry about the wait! The sum is 5.",
        "I cannot provide a proof in one line, so here it is in ten. " + "It goes on. " * 40,
    ],
)
def test_what_only_sounds_like_one_is_an_answer(content: str) -> None:
    assert complaint(content, None) is None


def test_a_pattern_cannot_hang_the_judge() -> None:
    began = time.monotonic()
    assert complaint("a" * 5000 + "b", Accept(pattern=r"(a|a|aa)+$")) is not None
    assert time.monotonic() - began < 10


def test_a_schema_cannot_reach_out() -> None:
    away = Accept(json_schema={"$ref": "http://127.0.0.1:1/schema.json"})
    assert "outside" in str(unusable(away))
    assert "does not fit" in str(complaint("1", away))


@pytest.mark.parametrize(
    ("accept", "said"),
    [
        (Accept(), None),
        (Accept(pattern="a+", json_schema=NUMBERED), None),
        (Accept(pattern="(a"), "no regular expression"),
        (Accept(json_schema={"type": "nonsense"}), "no JSON Schema"),
    ],
)
def test_rules_that_can_never_be_met_are_found_beforehand(accept: Accept, said: str | None) -> None:
    found = unusable(accept)
    assert (found is None) if said is None else (found is not None and said in found)


@given(st.text(max_size=50), st.text(min_size=1, max_size=20))
def test_any_pattern_and_any_answer_are_judged(content: str, pattern: str) -> None:
    accept = Accept(pattern=pattern)
    found = complaint(content, accept)
    if unusable(accept):
        assert found is not None
