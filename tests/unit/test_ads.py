"""Ads: the accepted forms of a task, and the requested type of its answer."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pydantic
import pytest

from loom.ads import ad_of, as_type, with_schema
from loom.schemas.errors import InvalidTask, LoomError, RejectedResult
from loom.schemas.task import Accept, TaskAd


@dataclass
class Point:
    x: int
    y: int


class Model(pydantic.BaseModel):
    name: str


def test_a_text_becomes_the_description() -> None:
    assert ad_of("sort these").description == "sort these"


@pytest.mark.parametrize("kind", [dict, MappingProxyType])
def test_a_mapping_has_the_fields_of_an_ad(kind: Callable[..., Any]) -> None:
    ad = ad_of(kind({"description": "sort", "domain": "code", "accept": {"contains": ["x"]}, "task_id": "t1"}))

    assert (ad.task_id, ad.domain, ad.accept) == ("t1", "code", Accept(contains=("x",)))
    assert ad_of(ad) is ad


@pytest.mark.parametrize(
    ("task", "sentence", "field"),
    [
        ({"description": "x", "domian": "code"}, "unknown field `domian`", "domian"),
        ({"description": "x", "priority": "urgent"}, "priority must be one of low, normal, high, critical", "priority"),
        ({"description": " "}, "description is empty: describe the work", "description"),
        ({"description": "x", "context": {"when": object()}}, "a value that is not JSON", None),
        ({}, "description is empty", "description"),
        (["x"], "a list is not a task: give a TaskAd, a dict of its fields, or a text", None),
        (None, "a NoneType is not a task", None),
    ],
)
def test_a_wrong_task_is_refused_in_the_words_of_the_wire(task: Any, sentence: str, field: str | None) -> None:
    with pytest.raises(InvalidTask) as caught:
        ad_of(task)
    assert sentence in caught.value.message
    assert caught.value.field == field


def test_a_wrong_ad_names_its_own_task_and_not_that_of_the_submitting_agent() -> None:
    for task_id in ("t1", ""):
        with pytest.raises(InvalidTask) as caught:
            ad_of({"task_id": task_id, "description": "x", "domian": "y"} if task_id else {"domian": "y"})
        assert caught.value.task_id == task_id


def test_parts_of_an_ad_may_be_mappings() -> None:
    ad: Any = TaskAd(description="x", accept={"contains": ["y"]}, limits={"max_depth": 1})  # type: ignore[arg-type]
    checked = ad_of(ad)

    assert checked.task_id == ad.task_id
    assert (checked.accept, checked.limits.max_depth) == (Accept(contains=("y",)), 1)  # type: ignore[union-attr]
    with pytest.raises(InvalidTask, match="unknown field `contain`"):
        ad_of(TaskAd(description="x", accept={"contain": ["y"]}))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Point, Model, list[int], dict[str, Point], int | None])
def test_the_schema_of_the_type_is_what_the_ad_accepts(kind: Any) -> None:
    ad = with_schema(TaskAd(description="x", accept=Accept(contains=("1",))), kind)

    assert ad.accept is not None
    assert ad.accept.json_schema
    assert ad.accept.contains == ("1",)


def test_a_schema_of_the_ads_own_stays_and_text_needs_none() -> None:
    own = TaskAd(description="x", accept=Accept(json_schema={"type": "object"}))

    assert with_schema(own, Point) is own
    assert with_schema(TaskAd(task_id="t1", description="x"), str).accept is None


def test_a_type_json_cannot_carry_is_refused() -> None:
    with pytest.raises(LoomError, match="returns=complex cannot be used"):
        with_schema(TaskAd(description="x"), complex)


def test_content_is_read_as_the_type() -> None:
    assert as_type('{"x": 1, "y": 2}', Point, "t1") == Point(1, 2)
    assert as_type('{"name": "a"}', Model, "t1") == Model(name="a")
    assert as_type("[1]", list[int], "t1") == [1]
    assert as_type("plain", str, "t1") == "plain"


def test_content_that_is_not_of_the_type_is_a_rejected_result_that_keeps_it() -> None:
    with pytest.raises(RejectedResult, match=r"the answer is not a Point: .*\$\.y") as caught:
        as_type('{"x": 1, "y": []}', Point, "t1")
    assert (caught.value.task_id, caught.value.partial) == ("t1", '{"x": 1, "y": []}')
