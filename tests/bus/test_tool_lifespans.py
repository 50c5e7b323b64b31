"""Connections of tools stay open as long as the host of their node."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from support.agents import Scripted, answering, wanting
from support.logs import capture_logs
from support.phase_harness import Stage
from support.runs import run

from loom.agents.tools import Lifespan, Tool
from loom.schemas.llm import ToolCall
from loom.types import AgentNode, CapabilityProfile


class Server:
    """A tool server that refuses the first `refusals` connections."""

    def __init__(self, refusals: int = 0) -> None:
        self.refusals = refusals
        self.entered: list[Any] = []
        self.left: list[Any] = []

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[int]:
        if self.refusals:
            self.refusals -= 1
            raise ConnectionRefusedError("10.0.0.1")
        self.entered.append(asyncio.current_task())
        async with asyncio.TaskGroup():  # which only its own task may leave
            yield len(self.entered)
        self.left.append(asyncio.current_task())

    def node(self, node_id: str, life: Lifespan[int]) -> AgentNode:
        made = Tool(name="files.read", schema={}, call=lambda _arguments, _context: life.value, lifespan=life)
        call = wanting(ToolCall(id="c1", name="files_read", arguments="{}"))
        agent = Scripted(*[call, answering("read")] * 2).agent(made)
        return AgentNode(id=node_id, agent=agent, capabilities=CapabilityProfile(scores={"code": 0.5}))


async def test_a_tool_server_is_opened_once_per_host_and_closed_with_it(stage: Stage) -> None:
    server = Server()
    life = Lifespan(server.connect)
    host = await stage.host([server.node("n1", life), server.node("n2", life)])

    for number, node_id in enumerate(("n1", "n1", "n2")):
        result = (await (await run(stage, host, task_id=f"t{number}", node_id=node_id)).event("result")).result
        assert result is not None
        assert (result.content, result.tool_errors) == ("read", 0)
    assert not server.left
    await host.drain(1)

    assert len(server.entered) == 1
    assert server.left == server.entered


async def test_a_server_that_cannot_be_reached_fails_the_run_and_not_the_next_one(stage: Stage) -> None:
    server = Server(refusals=1)
    life = Lifespan(server.connect, name="the file server")
    host = await stage.host([server.node("n1", life)])

    with capture_logs():
        watcher = await run(stage, host, task_id="t1")
        assert await watcher.code() == "agent_failed"
    assert b"the file server cannot be opened: ConnectionRefusedError" in b"".join(watcher.bodies)
    assert b"10.0.0.1" not in b"".join(watcher.bodies)

    result = (await (await run(stage, host, task_id="t2")).event("result")).result
    assert result is not None
    assert result.content == "read"
