"""Phases of the floor in one process: `python run_phases.py WORLD PHASE…`; WORLD is a FloorWorld in JSON."""

import asyncio
import os
import sys

import msgspec

from bench.checkout.event_loop import run
from bench.floor.floor_client import FloorClient
from bench.floor.floor_phases import FloorPhases
from bench.floor.floor_world import FloorWorld
from loom.bus import topology
from loom.bus.bus import Bus
from loom.schemas.config import ClusterConfig


async def run_phases(world: FloorWorld, names: list[str]) -> None:
    """Run the phases until the process is ended."""
    async with Bus(os.environ["NATS_URL"], namespace=os.environ["LOOM_NAMESPACE"], role="phases") as bus:
        await topology.apply(bus, ClusterConfig())
        client = FloorClient(bus)
        await client.start()
        await FloorPhases(client, world).start(names)  # type: ignore[arg-type]  # the names of phases
        await bus.requests.flush()
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    run(run_phases(msgspec.json.decode(sys.argv[1], type=FloorWorld), sys.argv[2:]))
