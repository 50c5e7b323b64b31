"""The rule that sends a task to SCALE: it reads SENSE's estimate in the envelope, and no setting."""

import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from loom.phases.sense.estimate import with_division
from loom.phases.shared import scale_rule
from loom.phases.shared.scale_rule import ScaleReason, scale_reason, with_undivided_note
from loom.schemas.auction import Award, ScoredBid, bids_json
from loom.schemas.base import decode, encode
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope, Spec, Split
from loom.schemas.task import Limits, TaskAd

AWARD = Award(node_id="n1", host_id="h1")
FULL = replace(AWARD, backlog=2)
CONFIG = ClusterConfig()


def task(spec: dict[str, Any] | None = None, *, depth: int = 0, **facts: Any) -> Envelope:
    written = Spec(complexity=0.9, domains=("code",), method="given", **{"divide": True, "deepest": 2, **(spec or {})})
    split = Split(parent="g", depth=depth, deadline=1e9) if depth else None
    ad = TaskAd(task_id="p", description="all of it")
    return Envelope(ad=ad, spec=written, split=split, deadline=1e9, **{"award": AWARD, **facts})


def sensed(complexity: float = 0.3, depth: int = 0, config: ClusterConfig = CONFIG, **facts: Any) -> Spec:
    spec = Spec(complexity=complexity, domains=("code",), method="given")
    return with_division(spec, TaskAd(description="all of it", **facts), depth, config)


@pytest.mark.parametrize(
    ("envelope", "reason"),
    [
        (task(), "divide"),
        (task(award=None), "no_bids"),
        (task(award=FULL), "divide"),
        (task({"divide": False}), None),
        (task({"divide": False}, award=FULL), "saturated"),
        (task({"whole": True}), None),
        (task({"whole": True}, award=FULL), "saturated"),
        (task(inputs={"a": "out a"}), None),  # put together already
        (task(inputs={"a": "out a"}, award=FULL), "saturated"),
        (task(depth=1), "divide"),
        (task(depth=2), None),
        (task({"deepest": 0}), None),
        (task(spec=None, attempt=3), "divide"),
        (replace(task(), spec=None), None),
    ],
)
def test_scale_receives_only_tasks_with_a_reason_for_it(envelope: Envelope, reason: ScaleReason | None) -> None:
    assert scale_reason(envelope) == reason
    assert scale_reason(decode(encode(envelope), Envelope)) == reason, "the wire keeps all it takes"


def test_the_rule_reads_no_settings() -> None:
    source = inspect.getsource(scale_rule)
    assert list(inspect.signature(scale_reason).parameters) == ["envelope"]
    assert "loom.schemas.config" not in source
    assert "loom.bus" not in source


@given(st.integers(1, 9), st.integers(0, 5), st.lists(st.sampled_from(["n2", "n3"]), max_size=3))
def test_copies_of_one_message_are_decided_alike_after_different_routes(
    attempt: int, backlog: int, excluded: list[str]
) -> None:
    """Fields that differ between copies on different routes do not decide about the division."""
    other = replace(
        task(), attempt=attempt, award=replace(AWARD, node_id="n9", backlog=backlog), excluded=tuple(excluded), step=7
    )
    assert scale_reason(other) == scale_reason(task()) == "divide"


def test_a_winner_is_a_node_on_a_host_of_an_owner() -> None:
    def bid(owner: str) -> ScoredBid:
        return ScoredBid(node_id="n1", owner=owner, host_id="h1", score=1, self_rating=1, trust=1, load=1.0, tools=1)

    assert not scale_rule.is_saturated(replace(AWARD, bids_json=bids_json([encode(bid("acme"))])))
    assert scale_rule.is_saturated(replace(AWARD, bids_json=bids_json(map(encode, (bid("local"), bid("acme"))))))


# -- what SENSE writes


@pytest.mark.parametrize(
    ("spec", "divide"),
    [
        (sensed(0.6), False),
        (sensed(0.61), True),
        (sensed(0.61, limits=Limits(mitosis_threshold=0.9)), False),
        (sensed(0.5, limits=Limits(mitosis_threshold=0.1)), False),  # only narrower
        (sensed(0.5, config=ClusterConfig(mitosis_threshold=0.4)), True),
        (sensed(context={"plan": True}), True),
        (sensed(context={"plan": [{"id": "a"}]}), True),
        (sensed(context={"plan": False}), False),
        (sensed(0.9, context={"plan": None}), True),
        (sensed(0.9, node_id="n1"), False),  # pinned: this node and no other
        (sensed(node_id="n1", context={"plan": True}), True),
    ],
)
def test_hard_tasks_and_tasks_with_the_wish_are_divided(spec: Spec, *, divide: bool) -> None:
    assert spec.divide is divide
    assert spec.note == ""


@pytest.mark.parametrize(("limit", "deepest"), [(None, 2), (1, 1), (0, 0), (9, 2)])
def test_an_ad_may_only_narrow_the_depth(limit: int | None, deepest: int) -> None:
    limits = None if limit is None else Limits(max_depth=limit)
    assert sensed(limits=limits).deepest == deepest


@pytest.mark.parametrize(("depth", "limits"), [(2, None), (1, Limits(max_depth=1)), (5, Limits(max_depth=0))])
def test_a_task_too_deep_to_be_divided_has_a_note(depth: int, limits: Limits | None) -> None:
    spec = sensed(0.9, depth, limits=limits)
    assert spec.note == f"not divided: at most {spec.deepest} divisions deep are allowed"
    assert scale_reason(replace(task(depth=depth), spec=spec)) is None
    assert sensed(0.3, depth, limits=limits).note == ""


def test_a_reason_is_noted_once_and_next_to_other_notes() -> None:
    spec = with_undivided_note(replace(sensed(), note="calibrated"), "no model is configured to plan")
    assert spec.note == "calibrated; not divided: no model is configured to plan"
    assert with_undivided_note(spec, "no model is configured to plan") == spec
