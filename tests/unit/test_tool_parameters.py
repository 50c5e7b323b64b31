"""Parameters and results of Python functions that are tools."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Optional, TypedDict

import attrs
import msgspec
import pydantic
import pytest
from typing_extensions import Doc

from loom.agents.tools import Tool, ToolResult, tool
from loom.agents.tools import ToolContext as Context
from loom.schemas.errors import LoomError

if TYPE_CHECKING:
    from loom import ToolContext

OPAQUE = object()
CONTEXT = Context(task_id="t1", attempt=2, call=3, remaining_s=10)


class Address(pydantic.BaseModel):
    street: str
    number: int = pydantic.Field(default=1, ge=1)


class Place(NamedTuple):
    lat: float
    lon: float


class Movie(TypedDict):
    title: str


@attrs.define
class Crate:
    weight: int


class Struct(msgspec.Struct):
    crates: list[Crate]


@dataclass
class Order:
    to: Address
    at: Place | None = None


def by_model(x: Address) -> Any:
    return x


def by_models(x: list[Address]) -> Any:
    return x


def by_dataclass(x: Order) -> Any:
    return x


def by_struct(x: Struct) -> Any:
    return x


def by_typed_dict(x: Movie) -> Any:
    return x


def by_named_tuple(x: Place) -> Any:
    return x


def by_path(x: Path) -> Any:
    return x


def by_list(x: list) -> Any:  # type: ignore[type-arg]
    return x


def by_tuple(x: tuple[int, str]) -> Any:
    return x


@pytest.mark.parametrize(
    ("fn", "value", "text"),
    [
        (by_model, '{"street":"a"}', '{"street":"a","number":1}'),
        (by_models, '[{"street":"a","number":2}]', '[{"street":"a","number":2}]'),
        (by_dataclass, '{"to":{"street":"a"},"at":[1,2]}', '{"to":{"street":"a","number":1},"at":[1.0,2.0]}'),
        (by_struct, '{"crates":[{"weight":2}]}', '{"crates":[{"weight":2}]}'),
        (by_typed_dict, '{"title":"M"}', '{"title":"M"}'),
        (by_named_tuple, "[1.5,2]", "[1.5,2.0]"),
        (by_path, '"/x"', '"/x"'),
        (by_list, '[1,"a"]', '[1,"a"]'),
        (by_tuple, '[1,"a"]', '[1,"a"]'),
    ],
)
async def test_a_value_of_any_kind_is_passed_in_and_returned(fn: Any, value: str, text: str) -> None:
    made = Tool(fn)

    assert await made.run(f'{{"x": {value}}}', CONTEXT) == ToolResult(text)
    for part in _parts(made.definition.parameters):
        assert part.get("type") != "array" or isinstance(part.get("items"), dict)


def _parts(value: Any) -> list[dict[str, Any]]:
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [*([value] if isinstance(value, dict) else []), *(part for each in below for part in _parts(each))]


async def test_a_field_that_does_not_fit_is_named_to_the_model() -> None:
    result = await Tool(by_dataclass).run('{"x": {"to": {"street": "a", "number": 0}}}', CONTEXT)

    assert result.failed
    assert "number: Input should be greater than or equal to 1" in result.text
    assert "$.x.to" in result.text


async def test_a_number_as_text_is_accepted() -> None:
    def double(n: int) -> int:
        return 2 * n

    assert await Tool(double).run('{"n": "4"}', CONTEXT) == ToolResult("8")


# -- descriptions and defaults


def properties(fn: Any) -> dict[str, Any]:
    return Tool(fn).definition.parameters["properties"]  # type: ignore[no-any-return]


def test_descriptions_of_parameters_are_kept() -> None:
    def look_up(
        city: Annotated[str, "the city"],
        page: Annotated[int, pydantic.Field(ge=1, description="from 1")],
        unit: Annotated[str | None, Doc("of temperature")] = None,
    ) -> None: ...

    assert properties(look_up) == {
        "city": {"type": "string", "description": "the city"},
        "page": {"type": "integer", "minimum": 1, "description": "from 1"},
        "unit": {"anyOf": [{"type": "string"}, {"type": "null"}], "description": "of temperature"},
    }


def test_a_section_on_arguments_describes_those_without_a_description() -> None:
    def look_up(city: str, unit: Annotated[str, "own"] = "c", days: int = 1) -> None:
        """Forecast the weather.

        The nearest station counts.

        Args:
            city: Its name,
                in English.
            unit (str): c or f.
            days: How many: 1 to 7.

        Returns:
            One line for each day.
        """

    described = {name: schema["description"] for name, schema in properties(look_up).items()}
    assert described == {"city": "Its name, in English.", "unit": "own", "days": "How many: 1 to 7."}
    assert Tool(look_up).definition.description == (
        "Forecast the weather.\n\nThe nearest station counts.\n\nReturns:\n    One line for each day."
    )


@pytest.mark.parametrize(
    "doc", ["Args: are below", "Do it.\n\nArgs:", "Do it.\n\nArgs:\n    none", "Do.\n\nArgs:\n  b: c"]
)
def test_any_docstring_makes_a_tool(doc: str) -> None:
    def act(a: int) -> None: ...

    act.__doc__ = doc
    assert properties(act) == {"a": {"type": "integer"}}


async def test_a_default_is_part_of_the_schema_where_json_can_carry_it() -> None:
    def act(unit: str = "celsius", where: Order | None = None, done: Any = OPAQUE, at: Path = Path("/x")) -> str:
        return f"{unit} {where} {at}"

    assert {name: schema.get("default") for name, schema in properties(act).items()} == {
        "unit": "celsius",
        "where": None,
        "done": None,
        "at": "/x",
    }
    assert (await Tool(act).run("{}", CONTEXT)).text == "celsius None /x"


async def test_a_pydantic_field_as_default_gives_the_default_and_the_description() -> None:
    def act(
        n: int = pydantic.Field(default=3, description="how many"),
        tags: list[str] = pydantic.Field(default_factory=list),  # noqa: B008
        m: int = pydantic.Field(ge=1),
    ) -> str:
        tags.append("x")
        return f"{n} {len(tags)} {m}"

    made = Tool(act)
    assert made.definition.parameters["required"] == ["m"]
    assert made.definition.parameters["properties"]["n"] == {"type": "integer", "description": "how many", "default": 3}
    for _ in range(2):
        assert (await made.run('{"m": 1}', CONTEXT)).text == "3 1 1"
    assert (await made.run('{"m": 0}', CONTEXT)).failed


# -- the context


def plain(a: int, context: ToolContext) -> str:
    return f"{a} {context.key}"


def optional(a: int, context: ToolContext | None = None) -> str:
    return f"{a} {context.key if context else 'nothing'}"


def old_optional(a: int, context: Optional[ToolContext] = None) -> str:  # noqa: UP045
    return optional(a, context)


def annotated(a: int, *, ctx: Annotated[ToolContext, "who asks"]) -> str:
    return optional(a, ctx)


def annotated_optional(a: int, ctx: Annotated[ToolContext | None, "who asks"] = None) -> str:
    return optional(a, ctx)


def quoted(a: int, ctx: "ToolContext") -> str:  # noqa: UP037
    return optional(a, ctx)


def mixed(a: int, ctx: dict[str, Any] | ToolContext | None = None) -> str:
    assert isinstance(ctx, Context)
    return optional(a, ctx)


@pytest.mark.parametrize("fn", [plain, optional, old_optional, annotated, annotated_optional, quoted, mixed])
async def test_the_context_is_passed_under_every_annotation(fn: Any) -> None:
    made = Tool(fn)

    assert list(made.definition.parameters["properties"]) == ["a"]
    assert "attempt" not in str(made.definition.parameters)
    assert await made.run('{"a": 1}', CONTEXT) == ToolResult("1 t1:2:3")


@pytest.mark.parametrize("fn", [plain, optional, annotated])
@pytest.mark.parametrize("name", ["context", "ctx"])
async def test_a_context_from_the_model_is_refused(fn: Any, name: str) -> None:
    forged = f'{{"a": 1, "{name}": {{"task_id": "forged", "attempt": 9, "remaining_s": 1}}}}'
    result = await Tool(fn).run(forged, CONTEXT)

    assert result.failed
    assert name in result.text


def test_a_context_inside_of_another_parameter_is_refused_when_made() -> None:
    def act(contexts: list[ToolContext]) -> None: ...

    with pytest.raises(LoomError, match="annotate contexts with ToolContext"):
        Tool(act)


def test_the_key_names_task_attempt_and_call() -> None:
    assert CONTEXT.key == "t1:2:3"


def test_a_decorated_method_is_still_a_function() -> None:
    @tool(name="twice", timeout_s=5)
    def double(n: int) -> int:
        return 2 * n

    assert (double.name, double.timeout_s, double(2)) == ("twice", 5, 4)


@pytest.mark.parametrize("module", ["loom.agents.tools", "loom.agents.values"])
def test_pydantic_and_jsonschema_are_loaded_only_where_they_are_used(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'pydantic', 'jsonschema_rs'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)

    assert done.stdout.strip() == "[]"
