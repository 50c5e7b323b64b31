"""Tools that are described by a JSON Schema or a type, such as the tools of a tool server."""

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pydantic
import pytest
from support.agents import JOB, MakeAgent
from support.logs import capture_logs
from support.openai_server import OpenAIServer, Reply

from loom.agents.tools import MAX_RESULT_BYTES, Lifespan, Tool, ToolContext, ToolRegistry, ToolResult, define_tool
from loom.schemas.errors import LoomError

CONTEXT = ToolContext(task_id="t1", attempt=1, remaining_s=10)
ADD = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a"],
}


async def total(arguments: dict[str, Any], _context: ToolContext) -> Any:
    return arguments["a"] + arguments.get("b", 0)


def make(call: Any = total, schema: Any = ADD, **more: Any) -> Tool:
    return Tool(**{"name": "add", "schema": schema, "call": call, **more})


def returning(value: Any) -> Tool:
    return make(lambda _arguments, _context: value, {"type": "object"})


async def test_a_call_gets_its_arguments_as_a_dict_and_the_context() -> None:
    async def show(arguments: dict[str, Any], context: ToolContext) -> Any:
        return {"given": arguments, "key": context.key}

    made = make(show, description="Add.")

    assert made.definition.description == "Add."
    assert made.definition.parameters == {key: value for key, value in ADD.items() if key != "$schema"}
    assert await made.run('{"a": 1}', CONTEXT) == ToolResult('{"given":{"a":1},"key":"t1:1:1"}')


@pytest.mark.parametrize(
    ("arguments", "blamed"),
    [
        ('{"a": "x"}', "$.a"),
        ("{}", '"a" is a required property'),
        ("[1]", "object"),
        ("{", "truncated"),
        ('{"a": ' + "[" * 3000, "nested too deeply"),
    ],
)
async def test_arguments_that_do_not_fit_the_schema_are_explained_to_the_model(arguments: str, blamed: str) -> None:
    result = await make().run(arguments, CONTEXT)

    assert result.failed
    assert result.text.startswith("Error: the arguments are not valid: ")
    assert blamed in result.text


async def test_all_that_servers_refuse_in_a_schema_is_reworded_and_still_checked() -> None:
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {"at": {"type": "array", "items": [{"type": "number"}, {"type": "number"}]}, "by": {}},
        "anyOf": [{"required": ["at"]}, {"required": ["by"]}],
    }
    made = make(lambda arguments, _context: arguments, schema)

    assert "anyOf" not in made.definition.parameters
    assert made.definition.parameters["properties"]["at"]["items"] == {"type": "number"}
    assert (await made.run("{}", CONTEXT)).failed
    assert (await made.run('{"at": [1, "x"]}', CONTEXT)).failed
    assert not (await made.run('{"at": [1, 2]}', CONTEXT)).failed


def test_a_schema_without_properties_gets_them() -> None:
    assert make(schema={"type": "object"}).definition.parameters == {"type": "object", "properties": {}}
    assert make(schema={}).definition.parameters == {"type": "object", "properties": {}}


def doubling() -> dict[str, Any]:
    links = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)}
    return {"type": "object", "$ref": "#/$defs/d0", "$defs": {**links, "d40": {"type": "object"}}}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array"}, "not array"),
        ({"type": "what"}, "cannot be used"),
        ({"$ref": "https://example.com/schema"}, "outside of the schema"),
        (doubling(), "parts with its references expanded"),
        ({"type": "object", "description": "x" * 70_000}, "at most 65536"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}, "cannot be used"),
    ],
)
def test_a_schema_that_cannot_be_used_or_is_out_of_bounds_is_refused_when_made(schema: Any, reason: str) -> None:
    with pytest.raises(LoomError, match=reason):
        make(schema=schema)


@pytest.mark.parametrize("parts", [{}, {"schema": ADD}, {"call": total}, {"fn": len, "schema": ADD, "call": total}])
def test_a_tool_is_a_function_or_a_schema_with_a_call(parts: Any) -> None:
    with pytest.raises(LoomError, match="give a function, or schema= and call="):
        Tool(name="x", **parts)


# -- names


@pytest.mark.parametrize(
    ("given", "name"),
    [("files.read", "files_read"), ("read file", "read_file"), ("a/b:c", "a_b_c"), ("plain-1", "plain-1")],
)
def test_a_tool_name_is_sanitised_and_the_original_kept(given: str, name: str) -> None:
    made = make(name=given)

    assert (made.name, made.definition.name, made.alias) == (name, name, given)


def test_names_in_other_scripts_and_long_ones_stay_apart() -> None:
    names = [make(name=given).name for given in ("天气", "地图", "x" * 70 + "a", "x" * 70 + "b")]

    assert len(set(names)) == 4
    assert all(name.isascii() and len(name) <= 64 for name in names)


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(LoomError, match="cannot name a tool"):
        make(name="")


async def test_a_model_may_call_a_tool_by_its_given_name(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(tool_calls=(("files.read", '{"a": 3}'),)), Reply(text="ok"))
    agent = make(Tool(name="files.read", schema=ADD, call=total))
    await agent.run(JOB)

    assert agent.tools == ("files_read",)
    assert server.requests[0].body["tools"][0]["function"]["name"] == "files_read"
    assert server.requests[1].messages[-1]["content"] == "3"


# -- parts of results

PNG = base64.b64encode(b"\x89PNG" + b"\0" * 64).decode()


def part(**facts: Any) -> SimpleNamespace:
    return SimpleNamespace(**facts)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([part(type="text", text="3"), part(type="text", text="4")], "3\n4"),
        ([part(type="image", data=PNG, mimeType="image/png")], "[image: image/png, 68 bytes]"),
        ([part(type="audio", data="AAAA", mimeType="audio/wav")], "[audio: audio/wav, 3 bytes]"),
        ([part(type="resource", resource=part(uri="file:///a", text="inside"))], "inside"),
        (
            [part(type="resource", resource=part(uri="file:///a", mimeType="a/b", blob="AA=="))],
            "[resource: file:///a, a/b, 1 bytes]",
        ),
        ([part(type="resource_link", uri="file:///a\nb", name="x")], "[resource_link: file:///a b]"),
        ([part(type="new")], "[new]"),
        ([{"type": "text", "text": "3"}], "3"),
        ([], ""),
    ],
)
async def test_parts_of_a_result_become_text_and_placeholders(content: Any, text: str) -> None:
    assert await returning(part(content=content, isError=False)).run("{}", CONTEXT) == ToolResult(text)
    assert await returning({"content": content}).run("{}", CONTEXT) == ToolResult(text)


async def test_an_error_of_a_tool_server_is_seen_by_the_model_and_not_by_the_bus() -> None:
    result = await returning(part(content=[part(type="text", text="no file x")], isError=True)).run("{}", CONTEXT)

    assert result == ToolResult("no file x", failed=True, published="Error: the tool failed")


async def test_a_result_with_structured_content_alone_becomes_json() -> None:
    value = part(content=[], structuredContent={"total": 3}, isError=False)

    assert await returning(value).run("{}", CONTEXT) == ToolResult('{"total":3}')


@pytest.mark.parametrize("value", [[1, 2], {"content": "text"}, {"content": [1]}, [{"kind": "a"}]])
async def test_any_other_value_is_handled_like_the_result_of_a_function(value: Any) -> None:
    assert (await returning(value).run("{}", CONTEXT)).text[0] in "[{"


async def test_a_long_result_of_a_tool_server_is_cut() -> None:
    result = await returning(part(content=[part(type="text", text="x" * 50_000)])).run("{}", CONTEXT)

    assert len(result.text) < MAX_RESULT_BYTES + 100


# -- arguments of a type


class Weather(pydantic.BaseModel):
    """A place and a time."""

    city: str = pydantic.Field(description="in English")
    days: int = 1


@dataclass
class Point:
    x: int
    tags: list[str] = field(default_factory=list)


async def test_a_tool_of_a_model_gets_an_object_of_it() -> None:
    async def forecast(params: Weather, context: ToolContext) -> Any:
        return [params.city, params.days, context.key]

    made = define_tool("forecast", "Forecast.", Weather, forecast)

    assert made.definition.description == "Forecast."
    assert made.definition.parameters["properties"]["city"]["description"] == "in English"
    assert await made.run('{"city": "Rome"}', CONTEXT) == ToolResult('["Rome",1,"t1:1:1"]')
    assert "city" in (await made.run("{}", CONTEXT)).text


async def test_a_tool_of_a_dataclass_too_and_with_a_sync_call() -> None:
    made = define_tool("draw", "Draw.", Point, lambda point, _context: point)

    assert await made.run('{"x": 1}', CONTEXT) == ToolResult('{"x":1,"tags":[]}')


def test_the_docstring_of_the_type_describes_a_tool_without_a_description() -> None:
    def of(kind: type) -> str:
        return Tool(name="x", schema=kind, call=lambda _arguments, _context: None).definition.description

    assert (of(Weather), of(Point)) == ("A place and a time.", "")


@pytest.mark.parametrize("kind", [list[int], object, int])
def test_a_type_that_is_not_an_object_is_refused(kind: Any) -> None:
    with pytest.raises(LoomError, match="tool x"):
        define_tool("x", "", kind, lambda _arguments, _context: None)


def test_a_registry_is_accepted_wherever_tools_are(make: MakeAgent) -> None:
    registry = ToolRegistry()

    @registry.register
    def now() -> str:
        return "noon"

    registry.register(define_tool("draw", "Draw.", Point, lambda point, _context: point))

    assert registry.get("now") is now
    assert registry.get("then") is None
    assert len(registry) == 2
    assert make(*registry).tools == ("now", "draw")
    with pytest.raises(LoomError, match="registered already"):
        registry.register(now)


# -- a tool server behind a session


class Session:
    """A tool server's session, in this process."""

    def __init__(self) -> None:
        self.open = True

    async def list_tools(self) -> list[SimpleNamespace]:
        return [
            part(name="add", description="Add.", inputSchema=ADD),
            part(name="files.read", description="Read.", inputSchema={"type": "object"}),
        ]

    async def call_tool(self, name: str, arguments: dict[str, Any]) -> SimpleNamespace:
        assert self.open
        if name == "files.read":
            return part(content=[part(type="text", text="no such file")], isError=True)
        return part(content=[part(type="text", text=str(arguments["a"] + arguments["b"]))], isError=False)


async def test_an_agent_uses_the_tools_of_a_server_while_its_session_is_open(
    server: OpenAIServer, make: MakeAgent
) -> None:
    sessions: list[Session] = []

    @asynccontextmanager
    async def connect() -> AsyncIterator[Session]:
        sessions.append(Session())
        yield sessions[-1]
        sessions[-1].open = False

    life = Lifespan(connect, name="the demo server")

    def of_server(offered: SimpleNamespace) -> Tool:
        return Tool(
            name=offered.name,
            description=offered.description,
            schema=offered.inputSchema,
            call=lambda arguments, _context: life.value.call_tool(offered.name, arguments),
            lifespan=life,
        )

    agent = make(*map(of_server, await Session().list_tools()))
    server.script(
        Reply(tool_calls=(("add", '{"a": 1, "b": 2}'), ("files.read", "{}"))), Reply(text="ok"), Reply(text="again")
    )

    async with agent:
        await agent.run(JOB)
        assert sessions[0].open
    assert [session.open for session in sessions] == [False]
    answers = [message["content"] for message in server.requests[1].messages if message["role"] == "tool"]
    assert answers == ["3", "no such file"]

    with capture_logs():
        outside = await of_server((await Session().list_tools())[0]).run('{"a": 1}', CONTEXT)
    assert "the demo server is not open" in outside.text
