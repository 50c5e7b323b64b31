"""JSON as values of types."""

import datetime as dt
import enum
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict
from uuid import UUID

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import TypedDict as PortableTypedDict

from loom.agents.values import from_json, to_text


class Place(NamedTuple):
    lat: float
    lon: float


class Colour(enum.Enum):
    RED = "red"


class Movie(TypedDict):
    title: str


class Address(pydantic.BaseModel):
    street: str
    number: int = pydantic.Field(default=1, ge=1)


class Shop(pydantic.BaseModel):
    name: str


@pydantic.dataclasses.dataclass
class Parcel:
    weight: int = pydantic.Field(ge=1)


@dataclass
class Order:
    to: Address
    sizes: tuple[int, str] = (1, "m")


@attrs.define
class Crate:
    order: Order
    weight: int = attrs.field(validator=attrs.validators.ge(1))


class Truck(msgspec.Struct):
    crates: list[Crate]
    root: Path = Path()


@dataclass
class Load:
    parcels: list[Parcel]
    floor: Annotated[int, pydantic.Field(ge=0)] = 0


class Street(PortableTypedDict):
    length: Annotated[int, pydantic.Field(ge=1)]


ORDER = Order(Address(street="High Street"), (2, "l"))
VALUES: list[tuple[Any, Any]] = [
    (Place, Place(1.0, 2.0)),
    (Colour, Colour.RED),
    (Movie, {"title": "M"}),
    (Address, Address(street="a", number=2)),
    (list[Address], [Address(street="a")]),
    (dict[str, Address], {"home": Address(street="a")}),
    (Address | None, None),
    (Address | Shop, Shop(name="n")),
    (list[Parcel], [Parcel(weight=1)]),
    (Order, ORDER),
    (Load, Load([Parcel(weight=1)])),
    (list[Street], [{"length": 1}]),
    (Crate, Crate(ORDER, 3)),
    (Truck, Truck([Crate(ORDER, 3)], Path("/x"))),
    (Path, Path("/x")),
    (Fraction, Fraction(1, 3)),
    (UUID, UUID(int=1)),
    (set[int], {1, 2}),
    (dt.date, dt.date(2024, 5, 1)),
    (Annotated[int, pydantic.Field(ge=1)], 1),
    (Annotated[int, pydantic.BeforeValidator(lambda value: int(value) + 0)], 4),
]


@pytest.mark.parametrize(("kind", "value"), VALUES, ids=lambda each: str(each)[:40])
def test_a_value_round_trips_through_its_text(kind: Any, value: Any) -> None:
    assert from_json(kind, to_text(value) if not isinstance(value, str) else f'"{value}"') == value


@pytest.mark.parametrize(
    ("kind", "raw", "named"),
    [
        (list[int], "[1, {}]", "$[1]"),
        (Order, '{"to": {"street": "a", "number": 0}}', "number: Input should be greater than or equal to 1"),
        (Order, '{"to": {"street": "a", "number": 0}}', "$.to"),
        (list[Parcel], '[{"weight": 0}]', "weight: "),
        (Crate, '{"order": {"to": {"street": "a"}}, "weight": 0}', "weight"),
        (Annotated[int, pydantic.Field(ge=1)], "0", ">= 1"),
        (list[Annotated[str, pydantic.Field(max_length=1)]], '["ab"]', "$[0]"),
        (Path, "1", "Path"),
        (Load, '{"parcels": [{"weight": 0}]}', "parcels[0].weight: "),
        (list[Load], '[{"parcels": [], "floor": -1}]', "floor: "),
        (Street, '{"length": 0}', "length: "),
        (Fraction, '"1/0"', "Fraction"),
        (Place, "[1]", "length"),
        (list[int], "[", "truncated"),
        (int, "", "truncated"),
        (int, "NaN", "invalid"),
        (Any, "[" * 5000, "nested"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_place(kind: Any, raw: str, named: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what is looked at
        from_json(kind, raw)

    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "raw", "value"),
    [
        (int, '"3"', 3),
        (list[float], '["1.5"]', [1.5]),
        (bool, '"true"', True),
        (int | None, '"null"', None),
        (int | str, '"3"', "3"),
        (str, '"3"', "3"),
        (Address, '{"street": "a", "number": "2"}', Address(street="a", number=2)),
    ],
)
def test_a_number_written_as_text_is_read_where_nothing_else_can_be_meant(kind: Any, raw: str, value: Any) -> None:
    assert from_json(kind, raw) == value


@given(st.text())
def test_any_text_is_a_value_or_a_value_error(raw: str) -> None:
    with suppress(ValueError):
        from_json(Order, raw)
