"""The page on tools: its code runs, and has the shown results."""

from typing import Any

from support.pages import programs

from loom.agents.tools import Tool, ToolContext

CONTEXT = ToolContext(task_id="t1", attempt=1, call=2, remaining_s=5)


def names_of(block: int) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "page"}
    exec(programs("docs/tools.md")[block].code, names)
    return names


async def test_the_function_on_the_page_is_a_tool() -> None:
    pay: Tool = names_of(0)["pay"]

    assert pay.definition.description == "Pay an amount."
    assert pay.definition.parameters["properties"] == {
        "to": {"type": "string", "description": "Name of the account."},
        "cents": {"type": "integer", "description": "at least 1"},
    }
    assert (await pay.run('{"to": "ann", "cents": 5}', CONTEXT)).text == '{"paid":"ann","key":"t1:1:2"}'


async def test_the_tool_server_on_the_page_is_used_through_its_lifespan() -> None:
    read: Tool = names_of(1)["read"]

    await read.start()
    result = await read.run('{"path": "a.txt"}', CONTEXT)
    await read.close()

    assert (read.name, result.text) == ("files_read", "files.read: a.txt")
