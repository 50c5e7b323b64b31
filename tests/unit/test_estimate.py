import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.phases.sense import estimate
from loom.phases.sense.estimate import (
    Estimate,
    complexity_of,
    estimate_schema,
    estimate_task,
    find_domains,
    prompt,
    read_estimate,
)
from loom.schemas.base import Undecodable
from loom.schemas.task import TaskAd


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("Refactor this Python function", "code"),
        ("Average of each column of the CSV", "data"),
        ("Write an essay", "writing"),
        ("Solve the equation", "math"),
        ("Investigate the literature", "research"),
        ("实现排序算法", "code"),
        ("统计销售表格", "data"),
        ("翻译这篇文章", "writing"),
        ("证明这个方程", "math"),
    ],
)
def test_keywords_name_the_domain(text: str, domain: str) -> None:
    assert find_domains(text)[0] == domain


def test_the_domain_with_most_keywords_comes_first() -> None:
    assert find_domains("Compare two Python functions and the API of each class") == ("code", "research")


def test_a_text_without_keywords_has_no_domain() -> None:
    assert find_domains("Hello there") == ()


@pytest.mark.parametrize(
    ("text", "domains", "score"),
    [
        ("", 0, 0.0),
        ("word " * 20, 0, 0.1),
        ("word " * 500, 0, 0.5),
        ("One. Two. Three.", 0, 3 / 200 + 0.15),
        ("One. Two.", 0, 2 / 200),
        ("Version 3.11.2 of 1.2.3 is out", 0, 6 / 200),
        ("- milk", 0, 2 / 200 + 0.1),
        ("1. milk", 0, 2 / 200 + 0.1),
        ("word", 3, 1 / 200 + 0.15),
        ("word", 2, 1 / 200),
    ],
)
def test_complexity_follows_the_formula(text: str, domains: int, score: float) -> None:
    assert complexity_of(text, domains) == pytest.approx(score)


def test_chinese_counts_two_characters_as_a_word_and_its_own_full_stops() -> None:
    assert complexity_of("实现排序算法", 0) == pytest.approx(3 / 200)
    assert complexity_of("你好。再见。谢谢。", 0) == pytest.approx(3 / 200 + 0.15)


@given(st.text(), st.integers(0, 5))
def test_complexity_is_always_in_range(text: str, domains: int) -> None:
    assert 0 <= complexity_of(text, domains) <= 0.9


def test_an_ad_with_domain_and_complexity_is_not_estimated() -> None:
    spec, unsure = estimate_task(TaskAd(domain="astrology", description="Write Python", estimated_complexity=0.0))
    assert (spec.method, spec.complexity, spec.domains[0], unsure) == ("given", 0.0, "astrology", False)


def test_a_named_domain_without_complexity_is_estimated_without_a_model() -> None:
    spec, unsure = estimate_task(TaskAd(domain="code", description="word " * 20))
    assert (spec.method, spec.complexity, unsure) == ("heuristic", pytest.approx(0.1), False)


def test_keywords_stand_in_for_a_missing_domain() -> None:
    spec, unsure = estimate_task(TaskAd(description="Solve the equation"))
    assert (spec.domains, spec.method, unsure) == (("math",), "heuristic", False)


@pytest.mark.parametrize("domain", ["", "   "])
def test_an_ad_without_a_domain_is_general_and_unsure(domain: str) -> None:
    spec, unsure = estimate_task(TaskAd(domain=domain, description="Hello"))
    assert (spec.domains, unsure) == (("general",), True)


@given(st.text(min_size=1), st.text(max_size=128))
def test_every_ad_gets_a_spec_that_can_be_auctioned(description: str, domain: str) -> None:
    spec, _ = estimate_task(TaskAd(domain=domain, description=description))
    assert spec.domain_token
    assert 1 <= len(spec.domains) <= 8


@pytest.mark.parametrize(
    "answer",
    [
        '{"complexity": 0.4, "domains": ["code"]}',
        '```json\n{"complexity": 0.4, "domains": ["code"]}\n```',
        'Here it is: {"domains": ["code"], "complexity": 0.4, "why": "x"} Hope it helps!',
    ],
)
def test_an_estimate_is_found_in_surrounding_text(answer: str) -> None:
    assert read_estimate(answer) == Estimate(complexity=0.4, domains=("code",))


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I don't know",
        "} {",
        '{"complexity": 2, "domains": ["code"]}',
        '{"complexity": "high", "domains": ["code"]}',
        '{"complexity": 0.4, "domains": []}',
        '{"complexity": 0.4, "domains": [""]}',
        '{"complexity": NaN, "domains": ["code"]}',
        "{" * 5000,
    ],
)
def test_an_answer_that_is_not_an_estimate_is_refused(answer: str) -> None:
    with pytest.raises(Undecodable):
        read_estimate(answer)


def test_the_requested_json_schema_matches_the_parsed_type() -> None:
    assert set(estimate_schema()["properties"]) == set(Estimate.__struct_fields__)


def test_a_long_description_is_cut_in_the_question() -> None:
    assert len(prompt(TaskAd(description="x" * 50_000))) < 5_000


_PLAIN_SENTENCE_END = re.compile(r"[.!?。！？]+(?:\s|$)|[。！？]")  # noqa: RUF001 - full-width on purpose
_PLAIN_LIST_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+", re.MULTILINE)


@given(st.text(alphabet="a1 .!?。！？-*•)\n\t\r\u2028", max_size=40))  # noqa: RUF001 - full-width on purpose
def test_sentences_and_lists_are_found_as_by_the_plain_rules(text: str) -> None:
    score = min(len(estimate._CJK_OR_MARK.sub(" ", text).split()) / 200, 0.5)
    score += 0.15 * (len(_PLAIN_SENTENCE_END.findall(text)) > 2) + 0.1 * (_PLAIN_LIST_ITEM.search(text) is not None)
    assert complexity_of(text, 0) == round(score, 4)


@pytest.mark.parametrize(
    "text", [".", "!?", "\n", "\n\t", "\r\n", " ", "1", "\n1", "。", "。a", ".a", "1) ", "代", "- "]
)
def test_a_long_description_is_estimated_fast(text: str) -> None:
    description = text * (60_000 // len(text.encode())) + "x"
    began = time.thread_time()
    estimate_task(TaskAd(description=description))
    assert time.thread_time() - began < 0.5  # quadratic work takes seconds
