"""The subjects of the code are those of the agreed table, no more and no fewer."""

import re

import pytest
from support.subject_table import PATTERNS, TABLE, Row, pattern_of

from loom.bus.bus import Bus
from loom.bus.subjects import FAMILIES, Family, Subjects
from loom.bus.tap import REPEATED, SHAPES
from loom.bus.topology import streams
from loom.schemas.config import ClusterConfig

BY_PATTERN = {family.pattern: family for family in FAMILIES}
NO_SHAPE = {"StatusQuery", "Offer", "RunEvent", "Stop"}
"""Bodies that the tap shows as bytes."""


def kind_of(family: Family) -> str:
    """The kind of a family in the words of the table."""
    return family.kind.removeprefix("stream ").partition(",")[0]


def test_the_code_has_the_rows_of_the_table() -> None:
    assert [family.pattern for family in FAMILIES] == [row.pattern for row in TABLE]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.pattern)
def test_a_row_has_its_kind_and_its_bodies(row: Row) -> None:
    family = BY_PATTERN[row.pattern]
    assert kind_of(family) == row.kind
    assert frozenset(re.findall(r"[A-Z][a-z]\w+", family.body)) == row.bodies


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.pattern)
def test_a_subject_of_a_row_is_built_and_read_back(row: Row) -> None:
    family, subjects = BY_PATTERN[row.pattern], Subjects("ns")
    tokens = [f"t{n}" for n in range(len(family.tokens))]
    subject = subjects.of(family.name, *tokens)
    parsed = subjects.parse(subject)
    assert parsed is not None
    assert (parsed.family, list(parsed.tokens.values())) == (family.name, tokens)
    assert pattern_of(subject, "ns") == row.pattern


def test_stored_subjects_are_in_their_stream_and_live_ones_in_none() -> None:
    kept = {
        subject.removeprefix("loom.").removesuffix(".>"): config["name"].removeprefix("LOOM_")
        for config in streams(Bus("nats://nowhere"), ClusterConfig())
        for subject in config["subjects"]
        if not subject.startswith("$KV.")
    }
    assert kept == {row.pattern.partition(".")[0]: row.kind for row in TABLE if row.kind not in {"request", "publish"}}


def test_the_tap_decodes_the_types_of_the_table() -> None:
    shapes = {name: shape.__name__ for name, shape in SHAPES.items()}
    for row in TABLE:
        family = BY_PATTERN[row.pattern]
        if family.name in shapes:
            assert shapes[family.name] in row.bodies
        else:
            assert row.bodies <= NO_SHAPE | {"TaskResult", "CallForBids"}, row.pattern
    assert set(shapes) | REPEATED <= {family.name for family in FAMILIES}


@pytest.mark.parametrize(
    "subject",
    [
        "ns.submit.t1",
        "ns.task.sense.t1",
        "ns.from.acme",
        "ns.from.acme.submit.t1",
        "ns.result.t1",
        "ns.lifecycle.joined.n1",
        "other.submit",
        "ns.later.scale.t1",
        "ns.task.sense.low.t 1",
        "ns",
        "",
    ],
)
def test_any_other_subject_is_outside_the_table(subject: str) -> None:
    assert pattern_of(subject, "ns") is None
    assert subject.rpartition(" ")[1] or Subjects("ns").parse(subject) is None


def test_the_table_names_no_subject_twice() -> None:
    assert len(PATTERNS) == len(TABLE)
