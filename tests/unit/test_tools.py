import asyncio
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.logs import capture_logs

from loom.agents.tools import MAX_RESULT_BYTES, Tool, ToolContext, ToolResult, tool
from loom.schemas.errors import LoomError

CONTEXT = ToolContext(task_id="t1", attempt=2, remaining_s=10, tool_context={"root": "data"})


@dataclass
class Point:
    x: int
    y: int = 0


@tool
def add(a: int, b: Annotated[int, msgspec.Meta(description="the second")] = 1) -> int:
    """Add two numbers."""
    return a + b


async def test_the_schema_comes_from_the_annotations_and_the_description_from_the_docstring() -> None:
    assert add.definition.name == "add"
    assert add.definition.description == "Add two numbers."
    assert add.definition.parameters == {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"type": "integer", "description": "the second", "default": 1},
        },
        "required": ["a"],
        "additionalProperties": False,
    }


def test_nested_types_are_described_too() -> None:
    def draw(points: list[Point], style: Literal["dots", "lines"] = "dots") -> None: ...

    schema = Tool(draw).definition.parameters

    assert schema["properties"]["points"] == {"type": "array", "items": {"$ref": "#/$defs/Point"}}
    assert schema["properties"]["style"] == {"type": "string", "enum": ["dots", "lines"], "default": "dots"}
    assert schema["$defs"]["Point"]["required"] == ["x"]


async def test_arguments_arrive_as_the_annotated_types() -> None:
    async def x_of(point: Point) -> int:
        assert isinstance(point, Point)
        return point.x

    assert await Tool(x_of).run('{"point": {"x": 4}}', CONTEXT) == ToolResult("4")


@given(a=st.integers(-(2**53), 2**53), b=st.integers(-(2**53), 2**53))
async def test_a_valid_call_returns_what_the_function_returns(a: int, b: int) -> None:
    assert await add.run(msgspec.json.encode({"a": a, "b": b}).decode(), CONTEXT) == ToolResult(str(a + b))
    assert await add.run(f'{{"a": {a}}}', CONTEXT) == ToolResult(str(add(a)))


@pytest.mark.parametrize(
    ("arguments", "blamed"),
    [
        ("{", "truncated"),
        ("", "`a`"),
        ("[1]", "object"),
        ('{"a": "x"}', "$.a"),
        ('{"a": 1, "c": 2}', "`c`"),
        ('{"a": ' + "[" * 3000, "$.a"),
        ('{"a": "\ud800"}', "surrogates"),
    ],
)
async def test_wrong_arguments_are_explained_to_the_model(arguments: str, blamed: str) -> None:
    result = await add.run(arguments, CONTEXT)

    assert result.failed
    assert result.text.startswith("Error: the arguments are not valid: ")
    assert blamed in result.text


@given(st.text())
async def test_no_arguments_make_a_tool_raise(arguments: str) -> None:
    assert isinstance(await add.run(arguments, CONTEXT), ToolResult)


async def test_no_arguments_at_all_suit_a_tool_without_parameters() -> None:
    assert await Tool(lambda: "pong", name="ping").run("", CONTEXT) == ToolResult("pong")


async def test_a_model_sees_an_exception_in_one_line_and_the_bus_only_its_type() -> None:
    def fail() -> None:
        raise FileNotFoundError("no\nsuch file")

    with capture_logs() as logs:
        result = await Tool(fail).run("{}", CONTEXT)

    published = "Error: the tool raised FileNotFoundError"
    assert result == ToolResult("Error: FileNotFoundError: no such file", failed=True, published=published)
    assert [(line["event"], line["tool"], line["task_id"]) for line in logs] == [("tool_failed", "fail", "t1")]


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Odd(BaseException):
    pass


@pytest.mark.parametrize(
    "error",
    [
        Wordless(),
        Odd("own"),
        GeneratorExit(),
        KeyboardInterrupt(),
        SystemExit(3),
        StopIteration(1),
        StopAsyncIteration(),
        asyncio.CancelledError(),
        ExceptionGroup("several", [ValueError("inner")]),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("kind", ["sync", "async", "lazy"])
async def test_every_result_of_a_tool_is_a_text_for_the_model(error: BaseException, kind: str) -> None:
    def fail() -> None:
        raise error

    async def fail_later() -> None:
        raise error

    def fail_while_iterated() -> Any:
        return (each() for each in [fail])

    fn = {"sync": fail, "async": fail_later, "lazy": fail_while_iterated}[kind]
    result = await Tool(fn, name="fail").run("{}", CONTEXT)

    assert result.failed
    assert result.text.startswith(f"Error: {type(error).__name__}")
    assert result.published == f"Error: the tool raised {type(error).__name__}"


async def test_a_tool_may_report_a_failure_without_raising() -> None:
    given = ToolResult("no such order", failed=True)

    assert await Tool(lambda: given, name="look_up").run("{}", CONTEXT) == given


async def test_the_generator_of_a_sync_tool_is_iterated_in_its_thread() -> None:
    here = threading.get_ident()

    def rows() -> Any:
        for _ in range(2):
            yield threading.get_ident() != here

    assert await Tool(rows).run("{}", CONTEXT) == ToolResult("[true,true]")


def test_an_async_generator_is_not_a_tool() -> None:
    async def rows() -> Any:
        yield 1

    with pytest.raises(LoomError, match="async generator"):
        Tool(rows)


async def test_a_tool_that_cancels_itself_has_failed() -> None:
    async def give_up() -> None:
        raise asyncio.CancelledError

    assert (await Tool(give_up).run("{}", CONTEXT)).failed


async def test_a_slow_tool_is_cancelled_after_its_timeout() -> None:
    cleaned_up = asyncio.Event()

    @tool(timeout_s=0.05)
    async def doze() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned_up.set()

    result = await doze.run("{}", CONTEXT)

    assert result == ToolResult("Error: no result within 0.05 s", failed=True)
    assert cleaned_up.is_set()


async def test_a_blocking_tool_neither_blocks_the_loop_nor_outlasts_its_timeout() -> None:
    release = threading.Event()
    began = time.monotonic()
    tools = [Tool(release.wait, name=f"block{n}", timeout_s=0.1) for n in range(20)]
    results = await asyncio.gather(*(each.run("{}", CONTEXT) for each in tools))
    release.set()

    assert all(result.failed for result in results)
    assert time.monotonic() - began < 5


async def test_a_tool_gets_no_more_time_than_the_job_has() -> None:
    hurried = ToolContext(task_id="t1", attempt=1, remaining_s=0.05)
    result = await Tool(asyncio.Event().wait, name="wait").run("{}", hurried)

    assert result.text == "Error: no result within 0.05 s"


async def test_the_context_is_passed_and_not_part_of_the_schema() -> None:
    def where(path: str, context: ToolContext) -> str:
        return f"{context.key} {context.tool_context['root']}/{path}"

    made = Tool(where)

    assert list(made.definition.parameters["properties"]) == ["path"]
    assert await made.run('{"path": "a.csv"}', CONTEXT) == ToolResult("t1:2:1 data/a.csv")


@pytest.mark.parametrize(
    ("value", "text"), [("ä", "ä"), (None, "null"), ({"n": [1, 2.5]}, '{"n":[1,2.5]}'), (Point(1), '{"x":1,"y":0}')]
)
async def test_a_value_that_is_not_text_becomes_json(value: Any, text: str) -> None:
    assert await Tool(lambda: value, name="value").run("{}", CONTEXT) == ToolResult(text)


@pytest.mark.parametrize("value", [object(), float("nan"), {"deep": float("inf")}, b"\xff"])
async def test_a_value_json_cannot_carry_is_an_error_without_repr(value: Any) -> None:
    result = await Tool(lambda: value, name="value").run("{}", CONTEXT)

    assert result.failed
    assert "0x" not in result.text


async def test_a_long_result_is_cut() -> None:
    result = await Tool(lambda: "é" * 50_000, name="long").run("{}", CONTEXT)

    assert len(result.text.encode()) <= MAX_RESULT_BYTES + 100
    assert result.text.endswith("[cut: 50000 characters in all]")


def test_a_decorated_function_can_still_be_called() -> None:
    assert add(1, 2) == 3


class _Opaque:
    pass


def _postponed(a: "Missing") -> None: ...  # type: ignore[name-defined]  # noqa: F821


def _positional(a: int, /) -> None: ...


def _variadic(*parts: str) -> None: ...


def _opaque(thing: _Opaque) -> None: ...


@pytest.mark.parametrize("fn", [_postponed, _positional, _variadic, _opaque, lambda: 1, partial(print)])
def test_a_function_that_models_cannot_call_is_refused_when_made(fn: Any) -> None:
    with pytest.raises(LoomError):
        Tool(fn)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_tool_without_time_is_refused(seconds: float) -> None:
    with pytest.raises(LoomError, match="timeout_s must be more than 0"):
        Tool(str, name="work", timeout_s=seconds)


def test_a_description_is_sanitised() -> None:
    made = Tool(name="work", description="half a pair \ud83d", schema={"type": "object"}, call=lambda _, __: "")

    assert made.definition.description == "half a pair ?"
