"""Tools that a model may call: Python functions, or calls described by a JSON Schema."""

from loom.agents.tools.context import ToolContext, ToolResult
from loom.agents.tools.lifespan import Lifespan
from loom.agents.tools.names import legal_name
from loom.agents.tools.registry import ToolRegistry, define_tool
from loom.agents.tools.result import MAX_RESULT_BYTES
from loom.agents.tools.tool import Tool, close_all, start_all, tool

__all__ = [
    "MAX_RESULT_BYTES",
    "Lifespan",
    "Tool",
    "ToolContext",
    "ToolRegistry",
    "ToolResult",
    "close_all",
    "define_tool",
    "legal_name",
    "start_all",
    "tool",
]
