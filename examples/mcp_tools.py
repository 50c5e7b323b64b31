"""Gives the tools of an MCP server to a language model on a node.

    pip install loom-nats mcp
    MCP_SERVER="npx -y @modelcontextprotocol/server-filesystem /data" loom host run mcp_tools.py

MCP_SERVER is a command, or the URL of a server with streamable HTTP. OPENAI_API_KEY or OPENAI_BASE_URL selects the
server of the model.
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
    """Connects to an MCP server and offers its tools; the server runs while a node with its tools does.

    Args:
        server: Parameters for starting the server, or its URL.
        name: Name of the server in messages.
    """

    def __init__(self, server: StdioServerParameters | str, *, name: str = "the MCP server") -> None:
        self._server = server
        self._client = Lifespan(lambda: Client(server), name=name)

    async def tools(self) -> list[Tool]:
        """Request the list of tools once and return them; names that models do not accept are changed."""
        remote_tools: list[RemoteTool] = []
        async with Client(self._server) as client:
            page = await client.list_tools()
            remote_tools += page.tools
            while page.next_cursor:
                page = await client.list_tools(cursor=page.next_cursor)
                remote_tools += page.tools
        return [self._tool(remote) for remote in remote_tools]

    def _tool(self, remote: RemoteTool) -> Tool:
        return Tool(
            name=remote.name,
            description=remote.description or "",
            schema=remote.input_schema,
            call=self._caller(remote.name),
            lifespan=self._client,
        )

    def _caller(self, name: str) -> Callable[[dict[str, Any], ToolContext], Any]:
        async def call(arguments: dict[str, Any], context: ToolContext) -> CallToolResult:  # noqa: ARG001 - the signature of a tool
            try:
                return await self._client.value.call_tool(name, arguments)
            except MCPError as error:
                if error.code == CONNECTION_CLOSED:
                    self._client.reopen()  # at the next call
                raise

        return call


def server_of(text: str) -> StdioServerParameters | str:
    """Return a URL unchanged, and other text as a command; its process does not inherit keys of the environment."""
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
