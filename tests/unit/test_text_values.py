"""Users' values as text."""

import collections
import datetime as dt
import decimal
import enum
import itertools
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.agents.values import NotText, to_json, to_text


class Colour(enum.Enum):
    RED = "red"


class Mode(enum.StrEnum):
    FAST = "fast"


class Place(NamedTuple):
    lat: float
    where: Path


class Model(pydantic.BaseModel):
    when: dt.date = dt.date(2024, 5, 1)
    secret: str = pydantic.Field(default="s3cret", exclude=True)


@pydantic.dataclasses.dataclass
class Guarded:
    shown: int = 1
    secret: str = pydantic.Field(default="s3cret", exclude=True)


class Blob(pydantic.BaseModel):
    raw: bytes = b"\x89PNG"


@dataclass
class Data:
    model: Model = field(default_factory=Model)
    path: Path = Path("/x")


@attrs.define
class Attrs:
    _hidden: int
    data: Data = attrs.field(factory=Data)


class Struct(msgspec.Struct, tag="s", rename="camel"):
    the_model: Model
    raw: bytes = b"abc"


class OldModel:
    """Resembles a model of pydantic 1."""

    __fields__ = {"a": None}

    def json(self) -> str:
        return '{"a": 1}'


class Scalar:
    """Resembles a scalar of numpy."""

    def tolist(self) -> float:
        return 1.5


def _letters() -> Iterator[str]:
    yield "a"
    yield "b"


DAY = '{"when":"2024-05-01"}'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("hé\nllo", "hé\nllo"),
        ("", ""),
        ("a\ud800b", "a?b"),
        (Mode.FAST, "fast"),
        (b"raw", "raw"),
        (bytearray("é".encode()), "é"),
        (memoryview(b"abc"), "abc"),
        (None, "null"),
        (True, "true"),
        (10**40, str(10**40)),
        (1.5, "1.5"),
        ({"b": b"raw", "s": "a\ud800b"}, '{"b":"raw","s":"a?b"}'),
        ({1: "a", None: 2, False: 3}, '{"1":"a","null":2,"false":3}'),
        ({uuid.UUID(int=1): 1, Colour.RED: 2}, '{"00000000-0000-0000-0000-000000000001":1,"red":2}'),
        (Colour.RED, '"red"'),
        (
            [dt.timedelta(seconds=3), decimal.Decimal("1.10"), Fraction(1, 3), Path("/x")],
            '["PT3S","1.10","1/3","/x"]',
        ),
        ({3, 20, 1}, "[1,3,20]"),
        (frozenset({"b", "a"}), '["a","b"]'),
        (collections.deque([1]), "[1]"),
        (collections.Counter("aab"), '{"a":2,"b":1}'),
        (range(3), "[0,1,2]"),
        ({"a": 1}.values(), "[1]"),
        ({"a": 1}.keys(), '["a"]'),
        (_letters(), '["a","b"]'),
        ((Model() for _ in range(2)), f"[{DAY},{DAY}]"),
        (map(str, (1, 2)), '["1","2"]'),
        (itertools.islice(itertools.count(), 2), "[0,1]"),
        (Place(1.0, Path("/x")), '[1.0,"/x"]'),
        (Model(), DAY),
        ({"x": [Model()]}, f'{{"x":[{DAY}]}}'),
        (Guarded(), '{"shown":1}'),
        ([Guarded()], '[{"shown":1}]'),
        (Data(), f'{{"model":{DAY},"path":"/x"}}'),
        (Attrs(3), f'{{"_hidden":3,"data":{{"model":{DAY},"path":"/x"}}}}'),
        (Struct(Model()), f'{{"type":"s","theModel":{DAY},"raw":"abc"}}'),
        (OldModel(), '{"a":1}'),
        ({"mean": Scalar()}, '{"mean":1.5}'),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_json_value_becomes_json_and_text_stays(value: Any, text: str) -> None:
    assert to_text(value) == text


_cycle: list[Any] = []
_cycle.append(_cycle)
_wide: list[Any] = [0]
for _ in range(30):
    _wide = [_wide, _wide]


class _BadModel(pydantic.BaseModel):
    n: int = 1

    @pydantic.field_serializer("n")
    def _fail(self, value: int) -> int:
        raise ValueError(f"secret {value}")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (object(), "a value of type object is neither text nor JSON"),
        (Model, "the class Model"),
        (1j, "of type complex"),
        (ValueError("returned"), "of type ValueError"),
        (lambda: 1, "of type function"),
        (sys, "of type module"),
        (sys.stdin, "neither text nor JSON"),
        (float("nan"), "not finite"),
        ({"deep": [float("inf")]}, "not finite"),
        (b"\xff", "bytes that are not UTF-8"),
        ([b"\xff"], "bytes that are not UTF-8"),
        (Blob(), "bytes that are not UTF-8"),
        (_BadModel(), "of type _BadModel cannot become JSON"),
        ({(1, 2): 3}, "a tuple as a key"),
        ({1: "a", "1": "b"}, "two keys"),
        (_cycle, "32 levels"),
        (_wide, "more than"),
        (itertools.count(), "more than"),
        (10**5000, "4300 digits"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_value_json_cannot_carry_is_refused_without_showing_the_value(
    value: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loom.agents.values.text.MAX_VALUES", 1000)

    with pytest.raises(NotText, match=reason) as caught:
        to_text(value)

    assert "0x" not in str(caught.value)
    assert "secret" not in str(caught.value)


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=20,
)


@given(_json)
def test_json_values_stay_as_they_are(value: Any) -> None:
    assert to_json(value) == value
    assert isinstance(value, str) or msgspec.json.decode(to_text(value)) == value
