"""The agents of a host's nodes: made of what the nodes have, started before their first run, closed at the end."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import Context
from typing import Any

from loom.agents.function_agent import as_agent
from loom.agents.host.slots import Node
from loom.agents.lifetime import Lifetime, has_lifetime
from loom.agents.protocol import StreamingAgent
from loom.schemas.errors import AgentFailed


class HostedAgents:
    """What the nodes of a host have for agents.

    Args:
        context: Context variables that `start` and `close` of agents see.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._made: dict[str, tuple[Any, StreamingAgent]] = {}
        """Node -> what it has for an agent, and the agent made of it."""
        self._lifetimes: dict[int, tuple[Any, Lifetime]] = {}
        """Identity of an agent -> the agent, kept so that the identity stays its own, and its lifetime."""
        self._runs: Counter[int] = Counter()
        """Identity of an agent -> its runs in hand."""
        self._ending: set[asyncio.Task[None]] = set()

    def of(self, node: Node) -> StreamingAgent:
        """Return the agent of a node, made once of what it has for one."""
        given, agent = self._made.get(node.id, (None, None))
        if agent is None or given is not node.agent:
            agent = as_agent(node.agent)
            self._made[node.id] = (node.agent, agent)
            if given is not None:
                self._let_go(given)
        return agent

    @asynccontextmanager
    async def ready(self, node: Node | None) -> AsyncIterator[StreamingAgent]:
        """Yield the agent of a node, started; it is not closed while the body runs.

        Raises:
            AgentFailed: It did not start, and the next run tries again; or the node has gone.
            LoomError: What the node has is not an agent.
        """
        if node is None:
            raise AgentFailed("the node left before the run began")
        agent, given = self.of(node), node.agent
        if not has_lifetime(given):
            yield agent
            return
        self._runs[id(given)] += 1
        try:
            await self._lifetime(given).started()
            yield agent
        finally:
            self._runs[id(given)] -= 1
            self._let_go(given)

    def forget(self, node_id: str) -> None:
        """Drop the agent of a node that has gone; it is closed if no other node has it."""
        given, _ = self._made.pop(node_id, (None, None))
        if given is not None:
            self._let_go(given)

    def release(self) -> None:
        """Have all agents closed, from synchronous code: by their event loop, if it still runs."""
        for _, lifetime in self._lifetimes.values():
            lifetime.close()

    async def close(self) -> None:
        """Close all agents side by side; each has 5 s."""
        lifetimes = [lifetime for _, lifetime in self._lifetimes.values()]
        self._lifetimes.clear()
        await asyncio.gather(*(lifetime.closed() for lifetime in lifetimes), *self._ending)

    def _lifetime(self, agent: Any) -> Lifetime:
        known = self._lifetimes.get(id(agent))
        if known is not None and not known[1].failed:
            return known[1]
        lifetime = Lifetime(agent, self._context)
        self._lifetimes[id(agent)] = (agent, lifetime)
        return lifetime

    def _let_go(self, agent: Any) -> None:
        """Close an agent that no node has and no run uses."""
        if self._runs[id(agent)] or any(given is agent for given, _ in self._made.values()):
            return
        del self._runs[id(agent)]
        _, lifetime = self._lifetimes.pop(id(agent), (None, None))
        if lifetime is not None:
            task = asyncio.get_running_loop().create_task(lifetime.closed())
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
