"""The tools of an MCP server, for a language model on a node.

    pip install loom-nats mcp
    MCP_SERVER="npx -y @modelcontextprotocol/server-filesystem /data" loom host run mcp_tools.py

MCP_SERVER is a command, or the URL of a server with streamable HTTP. The model is that of OPENAI_API_KEY, or of another
server: OPENAI_BASE_URL.
"""

import asyncio
import os
import shlex
from collections.abc import Callable
from typing import Any

from mcp import Client, MCPError, StdioServerParameters
from mcp.types import CONNECTION_CLOSED, CallToolResult
from mcp.types import Tool as RemoteTool

from loom import Agent, AgentConfig, OpenAIProvider, ToolContext
from loom.agents.tools import Lifespan, Tool
from loom.types import AgentNode, CapabilityProfile


class McpServer:
    """An MCP server whose tools agents may call; it runs while one of their nodes does.

    Args:
        server: How it is started, or its URL.
        name: For messages.
    """

    def __init__(self, server: StdioServerParameters | str, *, name: str = "the MCP server") -> None:
        self._server = server
        self._client = Lifespan(lambda: Client(server), name=name)

    async def tools(self) -> list[Tool]:
        """Return all its tools, asked of the server once; names that models cannot use are changed."""
        found: list[RemoteTool] = []
        async with Client(self._server) as client:
            page = await client.list_tools()
            found += page.tools
            while page.next_cursor:
                page = await client.list_tools(cursor=page.next_cursor)
                found += page.tools
        return [self._tool(each) for each in found]

    def _tool(self, remote: RemoteTool) -> Tool:
        return Tool(
            name=remote.name,
            description=remote.description or "",
            schema=remote.input_schema,
            call=self._caller(remote.name),
            lifespan=self._client,
        )

    def _caller(self, name: str) -> Callable[[dict[str, Any], ToolContext], Any]:
        async def call(arguments: dict[str, Any], context: ToolContext) -> CallToolResult:  # noqa: ARG001 - a tool's form
            try:
                return await self._client.value.call_tool(name, arguments)
            except MCPError as error:
                if error.code == CONNECTION_CLOSED:
                    self._client.reopen()  # by the next call
                raise

        return call


def server_of(text: str) -> StdioServerParameters | str:
    """Return a URL as it is, and anything else as a command, whose process gets no key of this environment."""
    if text.startswith(("http://", "https://")):
        return text
    command, *arguments = shlex.split(text)
    return StdioServerParameters(command=command, args=arguments)


config = AgentConfig(model=os.environ.get("LOOM_MODEL") or AgentConfig.model)
tools = asyncio.run(McpServer(server_of(os.environ["MCP_SERVER"])).tools())
nodes = [
    AgentNode(
        id="clerk",
        capabilities=CapabilityProfile(scores={"files": 0.9}),
        agent=Agent(OpenAIProvider(config), config, tools=tools),
    )
]
