"""JSON Schemas of types, as models' servers accept them."""

import datetime as dt
import decimal
import enum
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import attrs
import jsonschema_rs
import msgspec
import pydantic
import pytest
from annotated_types import Ge, Len
from typing_extensions import Doc

from loom.agents.values import json_schema, portable, to_json


class Place(NamedTuple):
    lat: float
    lon: float


class Colour(enum.Enum):
    RED = "red"


class Movie(TypedDict, total=False):
    title: Annotated[str, "as on the poster"]
    cast: list[Any]


class Address(pydantic.BaseModel):
    street: str = pydantic.Field(description="with the number")
    where: tuple[float, float] | None = None


class Person(pydantic.BaseModel):
    """A person."""

    name: str
    homes: list[Address] = []
    friends: "list[Person]" = []


@dataclass
class Order:
    buyer: Person
    sizes: tuple[int, str]
    note: Annotated[str, Doc("for the courier")] = ""
    places: list[Place] = field(default_factory=list)


@attrs.define
class Crate:
    order: Order
    labels: list  # type: ignore[type-arg]


class Opaquest:
    """A class without fields."""


class Tree(msgspec.Struct):
    """A node."""

    name: str
    children: list["Tree"] = []


EVERYTHING: list[Any] = [
    list,
    tuple,
    dict,
    set,
    list[Any],
    list[list[Any]],
    dict[str, list[Any]],
    Sequence[Any] | None,
    tuple[int, int],
    tuple[int, str, bool],
    tuple[Any, ...],
    tuple[()],
    Place,
    list[Place],
    Movie,
    Address,
    list[Person],
    Person | None,
    Person | Address,
    Order,
    Crate,
    Tree,
    Colour,
    bytes,
    Path,
    uuid.UUID,
    dt.date,
    dt.timedelta,
    decimal.Decimal,
    Literal["a", 1] | None,
    pydantic.PositiveInt,
]


def _parts(value: Any, at: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield at, value
        for key, child in value.items():
            yield from _parts(child, f"{at}.{key}")
    if isinstance(value, list):
        for n, child in enumerate(value):
            yield from _parts(child, f"{at}[{n}]")


@pytest.mark.parametrize("kind", EVERYTHING, ids=str)
def test_an_array_always_has_an_object_as_items_and_every_reference_leads_somewhere(kind: Any) -> None:
    schema = json_schema(kind)

    assert "$ref" not in schema
    for at, part in _parts(schema):
        assert "prefixItems" not in part, at
        if part.get("type") == "array":
            assert isinstance(part.get("items"), dict), at
        if "$ref" in part:
            assert part["$ref"].removeprefix("#/$defs/") in schema["$defs"], at
        assert not any("$defs" in child for child in part.values() if isinstance(child, dict)), at
    jsonschema_rs.validator_for(schema)
    assert to_json(schema) == schema


def test_a_tuple_is_an_array_of_as_many_items() -> None:
    assert json_schema(tuple[int, int]) == {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
    assert json_schema(tuple[int, str])["items"] == {"anyOf": [{"type": "integer"}, {"type": "string"}]}


def test_a_pydantic_models_tuple_is_one_too() -> None:
    where = json_schema(Address)["properties"]["where"]["anyOf"][0]

    assert where == {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}


@pytest.mark.parametrize(
    ("note", "text"),
    [
        (Annotated[str, "the city"], "the city"),
        (Annotated[str, Doc("the city")], "the city"),
        (Annotated[str, msgspec.Meta(description="the city")], "the city"),
        (Annotated[str, pydantic.Field(description="the city")], "the city"),
        (list[Annotated[str, "the city"]], "the city"),
        (Annotated[str, "the city"] | None, "the city"),
    ],
    ids=str,
)
def test_a_description_is_kept(note: Any, text: str) -> None:
    assert text in [part.get("description") for _, part in _parts(json_schema(note))]


def test_descriptions_of_fields_are_kept_in_classes_too() -> None:
    parts = json_schema(Crate)["$defs"]

    assert parts["Order"]["properties"]["note"]["description"] == "for the courier"
    assert json_schema(Movie)["properties"]["title"]["description"] == "as on the poster"
    assert parts["Address"]["properties"]["street"]["description"] == "with the number"
    assert parts["Person"]["description"] == "A person."


def test_bounds_of_other_libraries_reach_the_schema() -> None:
    assert json_schema(Annotated[int, pydantic.Field(ge=1, lt=9)]) == {
        "type": "integer",
        "minimum": 1,
        "exclusiveMaximum": 9,
    }
    assert json_schema(Annotated[int, Ge(3)])["minimum"] == 3
    assert json_schema(Annotated[list[int], Len(1, 3)])["maxItems"] == 3
    assert json_schema(pydantic.PositiveInt)["exclusiveMinimum"] == 0


def test_a_type_that_refers_to_itself_stays_among_the_definitions() -> None:
    schema = json_schema(Tree)

    assert schema["properties"]["children"]["items"] == {"$ref": "#/$defs/Tree"}
    assert schema["$defs"]["Tree"]["properties"]["name"] == {"type": "string"}


def test_two_classes_of_one_name_stay_apart() -> None:
    other = pydantic.create_model("Order", weight=(int, ...))
    model = pydantic.create_model("Box", orders=(list[other], ...))  # type: ignore[valid-type]

    @dataclass
    class Both:
        mine: Order
        box: model  # type: ignore[valid-type]

    Both.__annotations__ = {"mine": Order, "box": model}
    schema = json_schema(Both)

    assert schema["properties"]["mine"] == {"$ref": "#/$defs/Order"}
    assert schema["properties"]["box"]["properties"]["orders"]["items"] == {"$ref": "#/$defs/Order_2"}
    assert "weight" in schema["$defs"]["Order_2"]["properties"]
    assert "buyer" in schema["$defs"]["Order"]["properties"]


def test_references_of_any_kind_in_a_foreign_schema_still_lead_somewhere() -> None:
    foreign = {
        "type": "object",
        "properties": {
            "a": {"type": "string"},
            "b": {"$ref": "#/properties/a"},
            "c": {"$defs": {"D": {"type": "integer"}}, "$ref": "#/properties/c/$defs/D"},
        },
    }

    assert portable(foreign) == foreign


def test_a_format_that_servers_refuse_becomes_words() -> None:
    assert json_schema(dt.date) == {"type": "string", "description": "date"}
    assert json_schema(Annotated[uuid.UUID, "whose"]) == {"type": "string", "description": "whose (uuid)"}


@dataclass
class Broken:
    part: "Missing"  # type: ignore[name-defined]  # noqa: F821


class BrokenModel(pydantic.BaseModel):
    part: "Missing"  # type: ignore[name-defined]  # noqa: F821


class Opaque(pydantic.BaseModel, arbitrary_types_allowed=True):
    part: Opaquest


@pytest.mark.parametrize("kind", [object, complex, Opaquest, Broken, BrokenModel, list[Opaque], Order | Crate])
def test_a_type_json_cannot_carry_has_no_schema(kind: Any) -> None:
    with pytest.raises(TypeError) as caught:
        json_schema(kind)

    assert "\n" not in str(caught.value)


def test_a_default_that_json_cannot_carry_is_named() -> None:
    @dataclass
    class Settings:
        root: Path = Path()

    with pytest.raises(TypeError, match="default value of type PosixPath: give it as default_factory"):
        json_schema(Settings)


def test_fields_of_pydantic_in_a_dataclass_keep_their_bounds() -> None:
    @dataclass
    class Page:
        n: Annotated[int, pydantic.Field(ge=1, description="from 1")] = 1

    assert json_schema(list[Page])["items"]["properties"]["n"] == {
        "type": "integer",
        "minimum": 1,
        "description": "from 1",
        "default": 1,
        "title": "N",
    }


def test_a_schema_of_another_dialect_is_reworded() -> None:
    old = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {
            "point": {"type": "array", "items": [{"type": "number"}, {"type": "number"}]},
            "tags": {"type": ["array", "null"]},
            "format": {"type": "string", "format": "uri"},
            "anything": True,
        },
    }

    assert portable(old) == {
        "type": "object",
        "properties": {
            "point": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
            "tags": {"type": ["array", "null"], "items": {}},
            "format": {"type": "string", "description": "uri"},
            "anything": {},
        },
    }
