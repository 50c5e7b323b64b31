"""Node hosts in a process of their own, each on a connection of its own: `python hosts.py HOSTS NODES_EACH NAME`."""

import asyncio
import os
import sys
from contextlib import AsyncExitStack

from loom.agents.host.node_host import NodeHost
from loom.bus.bus import Bus
from loom.runner import log_output
from loom.types import AgentNode, CapabilityProfile

SLOTS = 100_000
"""More than a benchmark awards: no node is ever busy."""


async def work(description: str) -> str:
    return "done"


def node(name: str) -> AgentNode:
    return AgentNode(id=name, capabilities=CapabilityProfile(scores={"code": 0.7}), agent=work)


async def run(hosts: int, nodes_each: int, name: str) -> None:
    async with AsyncExitStack() as stack:
        for host in range(hosts):
            bus = await stack.enter_async_context(Bus(os.environ["NATS_URL"], role="node", patience_s=30))
            nodes = [node(f"{name}-{host}-{number}") for number in range(nodes_each)]
            await NodeHost(bus, lambda nodes=nodes: nodes, slots=SLOTS).start()  # type: ignore[misc]
        print("here", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    log_output.configure("error")
    asyncio.run(run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
