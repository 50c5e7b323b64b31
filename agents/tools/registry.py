"""Tools by name, and tools in the form of the predecessor's `define_tool`."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from loom.agents.tools.context import ToolContext
from loom.agents.tools.tool import Tool
from loom.schemas.errors import LoomError


class ToolRegistry:
    """Tools by name; it is accepted wherever a sequence of tools is.

    Args:
        tools: Tools, or functions to make tools of.

    Raises:
        LoomError: As `register`.
    """

    def __init__(self, tools: Iterable[Tool | Callable[..., Any]] = ()) -> None:
        self._tools: dict[str, Tool] = {}
        for each in tools:
            self.register(each)

    def register(self, tool: Tool | Callable[..., Any]) -> Tool:
        """Add a tool, or a function as a tool, and return the tool: also a decorator.

        Raises:
            LoomError: The function cannot be a tool, or the name is taken.
        """
        made = tool if isinstance(tool, Tool) else Tool(tool)
        if made.name in self._tools:
            raise LoomError(f"a tool named {made.name} is registered already: give this one another name")
        self._tools[made.name] = made
        return made

    def get(self, name: str) -> Tool | None:
        """Return the tool of that name, or None."""
        return self._tools.get(name)

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    def __len__(self) -> int:
        return len(self._tools)


def define_tool(
    name: str,
    description: str,
    parameters: type,
    execute: Callable[[Any, ToolContext], Any],
    *,
    timeout_s: float = 30.0,
) -> Tool:
    """Return a tool that calls `execute(arguments, context)` with its arguments as an object of the type `parameters`.

    Args:
        parameters: A pydantic model, dataclass, Struct or TypedDict.
        execute: Sync or async.
        timeout_s: Seconds one call may take.

    Raises:
        LoomError: The name is empty, or JSON cannot carry the type.
    """
    return Tool(name=name, description=description, schema=parameters, call=execute, timeout_s=timeout_s)
