"""Subjects: built and parsed in one place, and closed to tokens that change their shape."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import tokens

from loom.bus.subjects import FAMILIES, Family, Subjects
from loom.schemas.errors import InvalidTask

subjects = Subjects("loom")
namespaces = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,31}", fullmatch=True)
plain = set(string.ascii_letters + string.digits + "_-")
rejected = st.text(min_size=1).filter(lambda text: not set(text) <= plain)


@settings(deadline=None)
@given(namespace=namespaces, family=st.sampled_from(FAMILIES), data=st.data())
def test_a_built_subject_is_parsed_again(namespace: str, family: Family, data: st.DataObject) -> None:
    given_tokens = [data.draw(tokens, label=name) for name in family.tokens]
    subject = Subjects(namespace).of(family.name, *given_tokens)

    parsed = Subjects(namespace).parse(subject)

    assert parsed is not None
    assert parsed.family == family.name
    assert list(parsed.tokens.items()) == list(zip(family.tokens, given_tokens, strict=True))
    assert len(subject.split(".")) == len(family.pattern.split(".")) + 1


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.tokens], ids=lambda family: family.name)
@pytest.mark.parametrize(
    "bad", ["", "a.b", "a b", "a\n", "a\r\nPUB x", "a\t", ">", "a*", "**", "代码", "x" * 65, "\x00"]
)
def test_a_token_that_would_change_the_subject_is_refused_by_name(family: Family, bad: str) -> None:
    for at, name in enumerate(family.tokens):
        parts = ["ok"] * len(family.tokens)
        parts[at] = bad
        with pytest.raises(InvalidTask) as caught:
            subjects.of(family.name, *parts)
        assert caught.value.field == name
        assert name in caught.value.message


@settings(deadline=None)
@given(bad=rejected)
def test_no_other_character_gets_into_a_subject(bad: str) -> None:
    if bad == "*":
        assert subjects.of("status", bad) == "loom.status.*"
        return
    with pytest.raises(InvalidTask):
        subjects.of("status", bad)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_token_may_be_a_wildcard_and_none_may_be_missing(family: Family) -> None:
    assert subjects.of(family.name, *["*"] * len(family.tokens)).count("*") == len(family.tokens)
    with pytest.raises(KeyError):
        subjects.of(family.name, *["x"] * (len(family.tokens) + 2))


def test_an_unknown_family_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        subjects.of("nonsense")


@settings(deadline=None)
@given(phase=tokens, priority=tokens, task_id=tokens, key=tokens)
def test_the_named_builders_agree_with_the_table(phase: str, priority: str, task_id: str, key: str) -> None:
    assert subjects.task(phase, priority, task_id) == subjects.of("task", phase, priority, task_id)
    assert subjects.intake(phase, priority, task_id) == subjects.of("intake", phase, priority, task_id)
    assert subjects.later(phase, task_id, key) == subjects.of("later", phase, task_id, key)
    assert (subjects.submit, subjects.hosts, subjects.spawn) == tuple(map(subjects.of, ("submit", "hosts", "spawn")))


FOREIGN = "loom|loom.|.submit|other.submit|loom.nonsense|loom.submit.x|loom.status|loom.status.a.b|loom.task.a.b"


@pytest.mark.parametrize("subject", ["", *FOREIGN.split("|"), "loom.task.a.b.c.d", "$JS.ACK.x"])
def test_a_foreign_subject_is_not_parsed(subject: str) -> None:
    assert subjects.parse(subject) is None


def test_a_subject_that_names_a_task_gives_its_id() -> None:
    parsed = subjects.parse("loom.task.match.high.t-1")
    assert parsed is not None
    assert parsed.task_id == "t-1"
    assert parsed.tokens["priority"] == "high"

    parsed = subjects.parse("loom.host.local.h1")
    assert parsed is not None
    assert parsed.task_id == ""


@pytest.mark.parametrize("name", ["", "Loom", "a.b", "a b", "-a", "_a", "a*", ">", "ü", "a\n", "x" * 33, "loom/x"])
def test_a_namespace_that_is_not_a_single_plain_token_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="namespace"):
        Subjects(name)


@settings(deadline=None)
@given(one=namespaces, other=namespaces)
def test_namespaces_share_no_subject_stream_or_bucket(one: str, other: str) -> None:
    if one == other:
        return
    a, b = Subjects(one), Subjects(other)
    assert b.parse(a.submit) is None
    assert {a.everything, a.stream("TASKS"), a.bucket("records")}.isdisjoint(
        {b.everything, b.stream("TASKS"), b.bucket("records")}
    )


def test_names_of_streams_and_buckets() -> None:
    assert subjects.everything == "loom.>"
    assert subjects.stream("TASKS") == "LOOM_TASKS"
    assert subjects.bucket("records") == "loom_records"
