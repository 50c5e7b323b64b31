"""A registry of tools, and the `define_tool` of loom-agent 0.6."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from loom.agents.tools.context import ToolContext
from loom.agents.tools.tool import Tool
from loom.schemas.errors import LoomError


class ToolRegistry:
    """Finds tools by name; accepted wherever a sequence of tools is.

    Args:
        tools: Tools, or functions to make tools of.

    Raises:
        LoomError: Same as `register`.
    """

    def __init__(self, tools: Iterable[Tool | Callable[..., Any]] = ()) -> None:
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            self.register(tool)

    def register(self, tool: Tool | Callable[..., Any]) -> Tool:
        """Add a tool, or a function as a tool, and return the tool; may be used as a decorator.

        Raises:
            LoomError: The function cannot be a tool, or the name is taken already.
        """
        made = tool if isinstance(tool, Tool) else Tool(tool)
        if made.name in self._tools:
            raise LoomError(f"a tool named {made.name} is registered already: give this one another name")
        self._tools[made.name] = made
        return made

    def get(self, name: str) -> Tool | None:
        """Return the tool with that name, or None."""
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
    """Return a tool that calls `execute(arguments, context)` with the arguments as an object of type `parameters`.

    Args:
        name: Name of the tool.
        description: Description for the model.
        parameters: A pydantic model, dataclass, Struct or TypedDict.
        execute: A sync or async function.
        timeout_s: Seconds that a call may take.

    Raises:
        LoomError: The name is empty, or JSON cannot represent the type.
    """
    return Tool(name=name, description=description, schema=parameters, call=execute, timeout_s=timeout_s)
