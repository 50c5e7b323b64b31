"""Ads: the accepted fields, the errors for wrong ones, and the token of a domain."""

import json
import unicodedata
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.strategies import messages, tokens

from loom.schemas.base import MAX_AD_BYTES, MAX_CONTEXT_BYTES, encode, free_json_fault
from loom.schemas.checks.ad import check_ad, parse_ad
from loom.schemas.checks.labels import are_labels
from loom.schemas.errors import InvalidTask
from loom.schemas.task import Accept, Limits, TaskAd
from loom.schemas.tokens import domain_token, is_token

texts = st.text(st.characters(exclude_categories=["Cs"]))


def _ad(**fields: Any) -> bytes:
    return json.dumps({"description": "count the words", **fields}, ensure_ascii=False).encode()


DEEP = b'{"description": "x", "context": ' + b'{"a":' * 2000 + b"1" + b"}" * 2000 + b"}"

BAD: dict[str, tuple[bytes, str | None]] = {
    "not JSON": (b"hello", None),
    "empty": (b"", "description"),
    "not an object": (b"[]", None),
    "half of it": (b'{"description": "x"', None),
    "unknown field": (_ad(prioritty="high"), "prioritty"),
    "unknown field in accept": (_ad(accept={"contain": ["x"]}), "contain"),
    "unknown field in limits": (_ad(limits={"depth": 1}), "depth"),
    "wrong type": (_ad(domain=7), "domain"),
    "wrong type inside": (_ad(required_tools=["ok", 7]), "required_tools"),
    "too many labels": (_ad(labels={str(n): "" for n in range(17)}), "labels"),
    "a label that is not a text": (_ad(labels={"n": 1}), "labels"),
    "labels that are too long": (_ad(labels={"tenant": "x" * 2048}), "labels"),
    "a tool without a name": (_ad(tools_allowed=[""]), "tools_allowed"),
    "a required tool that is not allowed": (_ad(required_tools=["a", "b"], tools_allowed=["a"]), "required_tools"),
    "a required tool where none is allowed": (_ad(required_tools=["a"], tools_allowed=[]), "required_tools"),
    "description absent": (b"{}", "description"),
    "description empty": (_ad(description=""), "description"),
    "description blank": (_ad(description=" \n\t"), "description"),
    "description of 300 kB": (_ad(description="x" * 300_000), "description"),
    "description not UTF-8": (b'{"description": "\xff\xfe"}', "description"),
    "negative budget": (_ad(token_budget=-1), "token_budget"),
    "unknown priority": (_ad(priority="urgent"), "priority"),
    "id with a dot": (_ad(task_id="a.b"), "task_id"),
    "id with a space": (_ad(task_id="a b"), "task_id"),
    "id with a newline at its end": (_ad(task_id="a\n"), "task_id"),
    "id with a wildcard": (_ad(task_id="*"), "task_id"),
    "id empty": (_ad(task_id=""), "task_id"),
    "id too long": (_ad(task_id="x" * 65), "task_id"),
    "pin with two dots": (_ad(node_id="a.b.c"), "node_id"),
    "pin without an owner": (_ad(node_id=".b"), "node_id"),
    "no time": (_ad(timeout_s=0), "timeout_s"),
    "more than a day": (_ad(timeout_s=86_401), "timeout_s"),
    "complexity over 1": (_ad(estimated_complexity=1.5), "estimated_complexity"),
    "2,000-deep JSON": (DEEP, "context"),
    "33-deep JSON": (_ad(context=json.loads('{"a":' * 33 + "1" + "}" * 33)), "context"),
    "large context": (_ad(context={"a": "x" * MAX_CONTEXT_BYTES}), "context"),
    "number out of range": (b'{"description": "x", "context": {"a": 1e999}}', "context"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_by_name(what: str) -> None:
    raw, field = BAD[what]
    with pytest.raises(InvalidTask) as caught:
        parse_ad(raw)
    assert caught.value.code == "invalid_task"
    assert caught.value.field == field
    assert field is None or field in caught.value.message
    assert len(caught.value.message) < 500


def test_defaults_are_as_documented() -> None:
    ad = parse_ad(b'{"description": "count"}')
    assert is_token(ad.task_id)
    assert msgspec.structs.replace(ad, task_id="t") == TaskAd(task_id="t", description="count")
    assert (ad.priority, ad.timeout_s, ad.wait, ad.token_budget, ad.domain) == ("normal", 300.0, True, None, "")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ad=messages(TaskAd))
def test_json_may_submit_every_ad_of_python(ad: TaskAd) -> None:
    forbidden = ad.tools_allowed is not None and not set(ad.required_tools) <= set(ad.tools_allowed)
    forbidden = forbidden or not are_labels(ad.labels)
    if not ad.description.strip() or free_json_fault(ad.context, max_bytes=MAX_CONTEXT_BYTES) or forbidden:
        for refuse in (lambda: check_ad(ad), lambda: parse_ad(encode(ad))):
            with pytest.raises(InvalidTask):
                refuse()
    else:
        assert check_ad(ad) == parse_ad(encode(ad)) == ad


PYTHON_ONLY: dict[str, tuple[dict[str, Any], str | None]] = {
    "not a number": ({"context": {"a": float("nan")}}, "context"),
    "an object": ({"context": {"a": object()}}, "context"),
    "a context that is not an object": ({"context": ["a"]}, "context"),
    "a number for a text": ({"description": 7}, "description"),
    "no description": ({"description": None}, "description"),
    "a bad id": ({"task_id": "a.b"}, "task_id"),
    "an unknown priority": ({"priority": "urgent"}, "priority"),
    "a negative budget": ({"token_budget": -1}, "token_budget"),
    "no visible character": ({"description": " \t"}, "description"),
    "a bad limit": ({"limits": Limits(max_depth=99)}, "limits"),
    "too much": ({"description": "x" * MAX_AD_BYTES}, "description"),
    "far too much": ({"description": "x" * 10**6}, "description"),
    "labels of another form": ({"labels": ["a"]}, "labels"),
    "half a character in a label": ({"labels": {"a": "\ud800"}}, "labels"),
    "half a character": ({"description": "\ud800"}, None),
    "an object for a text": ({"domain": object()}, None),
}


@pytest.mark.parametrize("what", PYTHON_ONLY)
def test_an_ad_built_in_python_is_held_to_the_same_rules(what: str) -> None:
    fields, field = PYTHON_ONLY[what]
    with pytest.raises(InvalidTask) as caught:
        check_ad(TaskAd(**{"description": "x", **fields}))
    assert caught.value.field == field


def test_an_ad_of_exactly_the_limit_is_accepted() -> None:
    short = TaskAd(task_id="t", description="x")
    ad = TaskAd(task_id="t", description="x" * (1 + MAX_AD_BYTES - len(encode(short))))
    assert len(encode(ad)) == MAX_AD_BYTES
    assert parse_ad(encode(ad)) == ad
    with pytest.raises(InvalidTask):
        parse_ad(encode(ad) + b" ")


def test_nested_parts_round_trip() -> None:
    ad = parse_ad(_ad(accept={"contains": ["x"]}, limits={"max_depth": 1, "mitosis_threshold": 0.5}))
    assert ad.accept == Accept(contains=("x",))
    assert ad.limits == Limits(max_depth=1, mitosis_threshold=0.5)


@settings(deadline=None)
@given(token=tokens)
def test_a_token_is_its_own_slug_in_lower_case(token: str) -> None:
    assert domain_token(token) == token.lower()


@settings(deadline=None)
@given(domain=texts)
def test_a_slug_is_always_a_token_and_its_own_slug(domain: str) -> None:
    assert is_token(domain_token(domain))
    assert domain_token(domain_token(domain)) == domain_token(domain)


@settings(deadline=None)
@given(domain=texts)
def test_the_unicode_composition_of_a_text_makes_no_difference(domain: str) -> None:
    assert domain_token(unicodedata.normalize("NFC", domain)) == domain_token(unicodedata.normalize("NFD", domain))


def test_case_and_spaces_around_do_not_count() -> None:
    assert domain_token("Code") == domain_token("  CODE\n") == "code"
    assert (
        domain_token("Straßenbau & Brücken")
        == domain_token("STRAßENBAU & BRÜCKEN")
        != domain_token("STRASSENBAU & BRÜCKEN")
    )


def test_texts_of_any_script_are_distinguished() -> None:
    domain_tokens = {
        domain_token(domain)
        for domain in ("代码", "数据", "数 据", "données", "donnees", "c++", "c#", "a.b", "a b", "*", ">", "")
    }
    assert len(domain_tokens) == 12
    assert domain_token("代码").startswith("x-")


@pytest.mark.parametrize("text", ["", "a.b", "a b", "*", ">", "a\n", "ü", "x" * 65, "a\x00", " a"])
def test_text_forbidden_in_a_subject_is_not_a_token(text: str) -> None:
    assert not is_token(text)
