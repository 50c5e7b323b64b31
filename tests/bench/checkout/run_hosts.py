"""Node hosts of a checkout, each on a connection of its own: `python run_hosts.py NAME HOSTS NODES_EACH FAIL_EVERY`.

The agents do nothing. With FAIL_EVERY above 0, every so many runs of the process one fails.
"""

import asyncio
import os
import sys
from contextlib import AsyncExitStack
from itertools import count

from bench.checkout.event_loop import run
from bench.checkout.loom_names import AgentNode, Bus, CapabilityProfile, NodeHost, configure_logs

SLOTS = 512
"""Runs at once on each node: more than the benchmark keeps in flight, so that no task waits for a slot."""
CONNECTING = 50
"""Hosts that connect at the same time."""


async def host_nodes(name: str, hosts: int, nodes_each: int, fail_every: int) -> None:
    """Run the hosts until the process is ended."""
    runs = count(1)

    async def work(description: str) -> str:
        if fail_every and next(runs) % fail_every == 0:
            raise RuntimeError("the benchmark lets this attempt fail")
        return "done"

    async def start(host: int) -> None:
        connection = Bus(os.environ["NATS_URL"], namespace=os.environ["LOOM_NAMESPACE"], role="node", patience_s=30)
        bus = await stack.enter_async_context(connection)
        claims = CapabilityProfile(scores={"code": 0.7})
        nodes = [AgentNode(id=f"{name}-{host}-{node}", capabilities=claims, agent=work) for node in range(nodes_each)]
        node_hosts.append(NodeHost(bus, lambda: nodes, slots=SLOTS))
        await node_hosts[-1].start()

    node_hosts: list[NodeHost] = []
    async with AsyncExitStack() as stack:
        for first in range(0, hosts, CONNECTING):
            await asyncio.gather(*(start(host) for host in range(first, min(first + CONNECTING, hosts))))
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    configure_logs("error")
    run(host_nodes(sys.argv[1], *(int(number) for number in sys.argv[2:5])))
