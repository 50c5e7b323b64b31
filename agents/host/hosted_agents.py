"""The agents of a host's nodes, started before their first run and closed when no node has them any more."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import Context
from typing import Any

from loom.agents.function_agent import as_agent
from loom.agents.host.slots import Node
from loom.agents.lifetime import Lifetime
from loom.agents.protocol import StreamingAgent


class HostedAgents:
    """Creates, starts and closes the agents of a host's nodes.

    Args:
        context: Context variables in which agents are started and closed.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._agents: dict[str, tuple[Any, StreamingAgent]] = {}
        """Node id -> the object given as its agent, and the StreamingAgent made of it."""
        self._lifetimes: dict[int, tuple[Any, Lifetime]] = {}
        """`id()` of an agent -> the agent, kept so that the id is not reused, and its lifetime."""
        self._runs: Counter[int] = Counter()
        """`id()` of an agent -> number of its active runs."""
        self._closing: set[asyncio.Task[None]] = set()

    def agent_of(self, node: Node) -> StreamingAgent:
        """Return the StreamingAgent of a node; it is made once for each object given as the agent."""
        given, agent = self._agents.get(node.id, (None, None))
        if agent is None or given is not node.agent:
            agent = as_agent(node.agent)
            self._agents[node.id] = (node.agent, agent)
            if given is not None:
                self._close_if_unused(given)
        return agent

    @asynccontextmanager
    async def started(self, given: Any) -> AsyncIterator[None]:
        """Start the agent made of an object with a lifetime; it is not closed while the body runs.

        Raises:
            AgentFailed: The agent did not start; the next run tries again.
        """
        self._runs[id(given)] += 1
        try:
            await self._lifetime(given).started()
            yield
        finally:
            self._runs[id(given)] -= 1
            self._close_if_unused(given)

    def remove(self, node_id: str) -> None:
        """Remove the agent of a node that has left; it is closed if no other node has it."""
        given, _ = self._agents.pop(node_id, (None, None))
        if given is not None:
            self._close_if_unused(given)

    def release(self) -> None:
        """Close all agents from synchronous code; their event loop does it, if it still runs."""
        for _, lifetime in self._lifetimes.values():
            lifetime.close()

    async def close(self) -> None:
        """Close all agents concurrently; each may take 5 s."""
        lifetimes = [lifetime for _, lifetime in self._lifetimes.values()]
        self._lifetimes.clear()
        await asyncio.gather(*(lifetime.closed() for lifetime in lifetimes), *self._closing)

    def _lifetime(self, agent: Any) -> Lifetime:
        _, current = self._lifetimes.get(id(agent), (None, None))
        if current is not None and not current.failed:
            return current
        lifetime = Lifetime(agent, self._context)
        self._lifetimes[id(agent)] = (agent, lifetime)
        return lifetime

    def _close_if_unused(self, agent: Any) -> None:
        """Close an agent if no node has it and no run uses it."""
        if self._runs[id(agent)] or any(given is agent for given, _ in self._agents.values()):
            return
        del self._runs[id(agent)]
        _, lifetime = self._lifetimes.pop(id(agent), (None, None))
        if lifetime is not None:
            task = asyncio.get_running_loop().create_task(lifetime.closed())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
