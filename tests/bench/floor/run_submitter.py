"""The submitter of the floor: `python run_submitter.py WORLD`; it carries out orders."""

import asyncio
import os
import sys
from uuid import uuid4

import msgspec

from bench.checkout.event_loop import run
from bench.checkout.orders import serve_orders
from bench.floor.floor_client import FloorClient, message_id
from bench.floor.floor_world import FloorWorld
from bench.measure import closed_loop
from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg


class FloorSubmitter:
    """Stores submissions and waits for the messages with their results."""

    def __init__(self, bus: Bus, client: FloorClient, world: FloorWorld) -> None:
        self._bus, self._client, self._world = bus, client, world
        self._waiting: dict[str, asyncio.Future[None]] = {}
        """Subject of a result -> resolved when the result arrives."""

    async def start(self) -> None:
        """Subscribe to all results, in the reduced pattern."""
        if self._world.pattern == "reduced":
            await self._client.subscribe(self._client.subjects.of("result", "public", "*"), self._on_result)

    async def carry(self, tasks: int, in_flight: int) -> dict[str, object]:
        """Return the time of each task, in seconds."""
        return {"times_s": await closed_loop(self._submit, tasks, in_flight), "failures": {}}

    async def _submit(self) -> None:
        task_id, subjects = uuid4().hex, self._client.subjects
        subject = subjects.of("result", "public", task_id)
        arrived = self._waiting[subject] = asyncio.get_running_loop().create_future()
        if self._world.pattern == "full":
            subscription = await self._bus.connection.subscribe_sync(subject, self._on_result)
        payload, headers = b"x" * self._world.sizes.submission, message_id(f"{task_id}:{task_id}")
        self._client.store(subjects.intake("public", "normal", task_id), payload, headers, lambda _: None)
        await arrived
        if self._world.pattern == "full":
            self._bus.connection.unsubscribe(subscription)

    def _on_result(self, msg: Msg) -> None:
        self._waiting.pop(msg.subject).set_result(None)


async def submit_on_order(world: FloorWorld) -> None:
    """Connect, and carry out the orders of standard input."""
    async with Bus(os.environ["NATS_URL"], namespace=os.environ["LOOM_NAMESPACE"]) as bus:
        client = FloorClient(bus)
        await client.start()
        submitter = FloorSubmitter(bus, client, world)
        await submitter.start()
        await serve_orders(submitter.carry)


if __name__ == "__main__":
    run(submit_on_order(msgspec.json.decode(sys.argv[1], type=FloorWorld)))
