"""A stdio server of the Model Context Protocol, with tools that answer, fail, send an image and end the process.

It runs in the environment `mcp` and imports nothing else.
"""

import os

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f6"
    "45400000000049454e44ae426082"
)

server = MCPServer("demo")


@server.tool()
def add(a: int, b: int = 0) -> int:
    """Add two numbers."""
    return a + b


@server.tool(name="files.read")
def read(path: str) -> str:
    """Read a file."""
    raise ToolError(f"there is no {path}")


@server.tool()
def picture() -> Image:
    """Return a picture."""
    return Image(data=PIXEL, format="png")


@server.tool()
def crash() -> str:
    """End this server at once."""
    os._exit(1)


if __name__ == "__main__":
    server.run()
