"""Hosts of the floor, each on a connection of its own: `python run_hosts.py NAME HOSTS NODES_EACH WORLD`."""

import asyncio
import os
import sys
from contextlib import AsyncExitStack
from functools import partial

import msgspec

from bench.checkout.event_loop import run
from bench.floor.floor_client import FloorClient
from bench.floor.floor_phases import ANSWER_TO_BYTES
from bench.floor.floor_world import FloorWorld
from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg


class FloorHost:
    """Answers each call with an offer, and each run request with its events."""

    def __init__(self, client: FloorClient, name: str, world: FloorWorld) -> None:
        self._client, self._name, self._world = client, name, world

    async def start(self) -> None:
        """Subscribe to calls and run requests."""
        of = self._client.subjects.of
        await self._client.subscribe(of("auction", "*"), self._on_call)
        await self._client.subscribe(of("call", "local", self._name), self._on_call)
        await self._client.subscribe(of("run", "local", self._name), self._on_run)

    def _on_call(self, msg: Msg) -> None:
        instance, _, call_id = msg.data[:ANSWER_TO_BYTES].decode().rstrip().partition(".")
        subject = self._client.subjects.of("offer", "local", self._name, instance, call_id)
        self._client.publish(subject, "", b"x" * self._world.sizes.offer, b"")

    def _on_run(self, msg: Msg) -> None:
        ended = b"x" * self._world.sizes.run_ended
        if self._world.pattern == "reduced":
            self._client.publish(msg.reply, "", ended, b"")
            return
        self._client.publish(msg.reply, "", b"x" * self._world.sizes.run_accepted, b"")
        publish_end = partial(self._client.publish, msg.reply, "", ended, b"")
        asyncio.get_running_loop().call_soon(publish_end)  # the run begins in a turn of its own


async def run_hosts(name: str, hosts: int, world: FloorWorld) -> None:
    """Run the hosts until the process is ended."""
    async with AsyncExitStack() as stack:
        for number in range(hosts):
            connection = Bus(os.environ["NATS_URL"], namespace=os.environ["LOOM_NAMESPACE"], role="node", patience_s=30)
            bus = await stack.enter_async_context(connection)
            await FloorHost(FloorClient(bus), f"{name}-{number}", world).start()
            await bus.requests.flush()
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    run(run_hosts(sys.argv[1], int(sys.argv[2]), msgspec.json.decode(sys.argv[4], type=FloorWorld)))
