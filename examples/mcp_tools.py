"""The tools of an MCP server, for a language model on a node.

    pip install loom-nats mcp
    MCP_SERVER="npx -y @modelcontextprotocol/server-filesystem /data" loom node mcp_tools.py

MCP_SERVER is a command, or the URL of a server with streamable HTTP. The model is that of OPENAI_API_KEY, or of another
server: OPENAI_BASE_URL.
"""

import asyncio
import os
import shlex
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from mcp import Client, MCPError, StdioServerParameters
from mcp.types import CONNECTION_CLOSED, CallToolResult, ListToolsResult
from mcp.types import Tool as RemoteTool

from loom import Agent, AgentConfig, OpenAIProvider, ToolContext
from loom.agents.tools import Lifespan, Tool
from loom.types import AgentNode, CapabilityProfile

END_S = 5.0


class Connection:
    """A client of an MCP server, and whether the server is still there."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._lost = asyncio.Event()
        self.ended = asyncio.Event()

    async def call(self, name: str, arguments: dict[str, Any]) -> CallToolResult:
        """Call a tool; once the server has gone, end the connection, so that the next call opens another."""
        try:
            return await self._client.call_tool(name, arguments)
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                self._lost.set()
                async with asyncio.timeout(END_S):
                    await self.ended.wait()
            raise

    async def watch(self) -> None:
        """Raise ConnectionError as soon as a call finds that the server has gone."""
        await self._lost.wait()
        raise ConnectionError("the MCP server has ended")


class McpServer:
    """An MCP server whose tools agents may call; it runs while one of their nodes does.

    Args:
        server: How it is started, or its URL.
        name: For messages.
    """

    def __init__(self, server: StdioServerParameters | str, *, name: str = "the MCP server") -> None:
        self._server = server
        self._lifespan = Lifespan(self._connected, name=name)

    async def tools(self) -> list[Tool]:
        """Return all its tools, asked of the server once; names that models cannot use are changed."""
        found: list[RemoteTool] = []
        async with Client(self._server) as client:
            page = await client.list_tools()
            found += page.tools
            while page.next_cursor:
                page: ListToolsResult = await client.list_tools(cursor=page.next_cursor)
                found += page.tools
        return [self._tool(each) for each in found]

    def _tool(self, remote: RemoteTool) -> Tool:
        return Tool(
            name=remote.name,
            description=remote.description or "",
            schema=remote.input_schema,
            call=self._caller(remote.name),
            lifespan=self._lifespan,
        )

    def _caller(self, name: str) -> Callable[[dict[str, Any], ToolContext], Any]:
        async def call(arguments: dict[str, Any], context: ToolContext) -> CallToolResult:  # noqa: ARG001 - a tool's form
            return await self._lifespan.value.call(name, arguments)

        return call

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Connection]:
        connection = None
        try:
            async with Client(self._server) as client, asyncio.TaskGroup() as group:
                connection = Connection(client)
                watching = group.create_task(connection.watch())
                yield connection
                watching.cancel()
        finally:
            if connection is not None:
                connection.ended.set()


def server_of(text: str) -> StdioServerParameters | str:
    """Return a URL as it is, and anything else as a command; the server gets no environment of this process."""
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
