"""Acceptance criteria: the rules of the event loop, and the outcome of a check in the helper's own code."""

import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.bombs import COSTLY_PATTERNS, OVERSIZED_PATTERNS, OVERSIZED_SCHEMAS, SLOW_TO_READ

from loom.phases.shared.acceptance import encoded_schema, has_check, out_of_bounds, plain_violation
from loom.phases.shared.json_schema_check import Request, check
from loom.schemas.base import encode
from loom.schemas.task import Accept

NUMBERED = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"left": {"$ref": "#/$defs/node"}, "right": {"$ref": "#/$defs/node"}},
            "additionalProperties": False,
        }
    },
}


def asked(accept: Accept, content: str | None = None) -> str | None:
    """The helper's outcome: None, or its sentence."""
    schema = msgspec.Raw(encode(accept.json_schema))
    return check(Request(5.0, accept.pattern, schema, content)).fault or None


@pytest.mark.parametrize(
    ("content", "accept", "reason"),
    [
        ("42", None, None),
        ("", None, "empty"),
        (" \n\t", None, "empty"),
        ("the answer is 42", Accept(contains=("42", "answer")), None),
        ("the answer is 43", Accept(contains=("42",)), "does not contain '42'"),
    ],
)
def test_a_plain_rule_names_the_fault(content: str, accept: Accept | None, reason: str | None) -> None:
    found = plain_violation(content, accept)
    assert (found is None) if reason is None else (found is not None and reason in found)


@pytest.mark.parametrize(
    ("content", "accept", "reason"),
    [
        ("order 66", Accept(pattern=r"\border \d+"), None),
        ("order six", Accept(pattern=r"\border \d+"), "does not match"),
        ('{"n": 1}', Accept(json_schema=NUMBERED), None),
        ('{"n": "1"}', Accept(json_schema=NUMBERED), "does not fit"),
        ("n is 1", Accept(json_schema=NUMBERED), "is not JSON"),
        ("[" * 5000, Accept(json_schema=NUMBERED), "is not JSON"),
        ('{"n": 1}', Accept(pattern="2", json_schema=NUMBERED), "does not match"),
        ('{"left": {"right": {}}}', Accept(json_schema=TREE), None),
        ('{"left": {"middle": {}}}', Accept(json_schema=TREE), "does not fit"),
    ],
)
def test_a_check_names_the_fault(content: str, accept: Accept, reason: str | None) -> None:
    assert out_of_bounds(accept) is None
    found = asked(accept, content)
    assert (found is None) if reason is None else (found is not None and reason in found)


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
def test_a_refusal_is_not_an_answer(content: str) -> None:
    assert plain_violation(content, None) == "the agent refuses the task"


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
def test_text_that_resembles_a_refusal_is_an_answer(content: str) -> None:
    assert plain_violation(content, None) is None


def test_a_schema_cannot_reach_out() -> None:
    away = Accept(json_schema={"$ref": "http://127.0.0.1:1/schema.json"})
    assert out_of_bounds(away) is None
    assert "outside" in str(asked(away))


@pytest.mark.parametrize(
    ("accept", "reason"),
    [
        (Accept(), None),
        (Accept(pattern="a+", json_schema=NUMBERED), None),
        (Accept(pattern="(a"), "not a regular expression"),
        (Accept(pattern=r"(?P<n>a)(?P<n"), "not a regular expression"),
        (Accept(json_schema={"type": "nonsense"}), "not a JSON Schema"),
        (Accept(json_schema={"$ref": "#/$defs/absent"}), "not a JSON Schema"),
        (Accept(json_schema={"pattern": "(a"}), "not a JSON Schema"),
    ],
)
def test_rules_that_can_never_be_met_are_found_beforehand(accept: Accept, reason: str | None) -> None:
    found = asked(accept)
    assert (found is None) if reason is None else (found is not None and reason in found)


@given(st.text(max_size=50), st.text(min_size=1, max_size=20))
def test_any_pattern_and_any_answer_are_judged(content: str, pattern: str) -> None:
    accept = Accept(pattern=pattern)
    if out_of_bounds(accept) is None:
        unusable = asked(accept)
        judged = asked(accept, content)
        assert judged == unusable if unusable else judged is None or "does not match" in judged


@pytest.mark.parametrize("pattern", OVERSIZED_PATTERNS.values(), ids=OVERSIZED_PATTERNS)
def test_a_pattern_beyond_the_bounds_is_refused_unread_by_the_compiler(pattern: str) -> None:
    found = out_of_bounds(Accept(pattern=pattern))
    assert found is not None
    assert found.startswith("accept.pattern ")
    as_schema = out_of_bounds(Accept(json_schema={"properties": {"x": {"pattern": pattern}}}))
    assert as_schema == found.replace("accept.pattern", "accept.json_schema")
    assert out_of_bounds(Accept(json_schema={"patternProperties": {pattern: True}})) == as_schema


@pytest.mark.parametrize("schema", OVERSIZED_SCHEMAS.values(), ids=OVERSIZED_SCHEMAS)
def test_a_schema_beyond_the_bounds_is_refused_unread_by_the_compiler(schema: dict[str, Any]) -> None:
    accept = Accept(json_schema=schema)
    encoded = encoded_schema(accept)
    found = encoded if isinstance(encoded, str) else out_of_bounds(accept)
    assert found is not None
    assert found.startswith("accept.json_schema ")


@pytest.mark.parametrize(
    "pattern",
    [
        *COSTLY_PATTERNS,
        r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?(Z|[+-]\d{2}:\d{2})$",
        r"(?i)\b[\w.+-]{1,64}@[\w-]+(\.[\w-]+){1,8}\b",
        r"(?P<quote>['\"]).*?(?P=quote)",
        r"(?s-i:a{1000})(?x) b  # a comment with ( and {e<=1} and a{5000}" + "\n c",
        r"[[:alpha:]{}()*+]{1,1000}[]a{2000}]\{e\}\p{Lu}{2}\N{DIGIT ONE}{3}",
        r"(?<=a{1,100})b(?<!c)(?=d)(?!e)(?>f)(?|g|h)(?(1)i|j)(*FAIL)",
        '{"name": "[^"]+"}',
        "a{}b{ }{,}",
        "(" * 50 + "x" + ")" * 50,
    ],
)
def test_a_pattern_of_ordinary_size_keeps_the_bounds(pattern: str) -> None:
    assert out_of_bounds(Accept(pattern=pattern)) is None


@pytest.mark.parametrize(
    "schema",
    [
        TREE,
        {"$ref": "#"},
        {"$id": "https://example.org/a", "$defs": {"b": {"$id": "b", "items": {"$ref": "a"}}}, "$ref": "b"},
        {"$defs": {"b": {"$anchor": "b", "enum": [1, 2**64]}}, "items": {"$ref": "#b"}, "multipleOf": 0.01},
        {"$ref": "#/$defs/no~1such~0thing"},
        {"$ref": "http://[half", "pattern": "^a{1,1000}$"},
        {"properties": {name: {"$ref": "#"} for name in ("$ref", "pattern", "enum", "$id", "patternProperties")}},
    ],
)
def test_a_schema_of_ordinary_size_keeps_the_bounds(schema: dict[str, Any]) -> None:
    assert out_of_bounds(Accept(json_schema=schema)) is None


@pytest.mark.parametrize("accept", SLOW_TO_READ)
def test_the_bounds_are_found_in_a_moment(accept: Accept) -> None:
    def cost_s() -> float:
        began = time.thread_time()
        encoded_schema(accept)
        out_of_bounds(accept)
        return time.thread_time() - began

    assert min(cost_s() for _ in range(3)) < 0.5  # quadratic work takes seconds, on a busy machine more


@given(st.text(alphabet="()[]{}?*+\\aLPRxe<>:|^$.-=!#,019 \n", max_size=1000))
def test_parsing_any_pattern_is_fast(pattern: str) -> None:
    began = time.thread_time()
    out_of_bounds(Accept(pattern=pattern or "a"))
    assert time.thread_time() - began < 0.5  # quadratic work takes seconds


def test_only_a_pattern_or_a_schema_needs_a_check() -> None:
    assert not any(map(has_check, [None, Accept(), Accept(contains=("a",), rubric="short", threshold=0.9)]))
    assert all(map(has_check, [Accept(pattern="a"), Accept(json_schema={})]))
