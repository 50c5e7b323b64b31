"""Creates streams, buckets and consumers again that are deleted or lost while phases run."""

import asyncio

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import LoomError

log = get_logger()

CHECK_S = 30.0
"""Seconds between two checks while no call has reported a missing stream or consumer."""
PAUSE_S = 0.5
"""Shortest time between two checks, in seconds: many requests fail at once when a store is lost."""
REPORT_S = 10.0
"""Seconds between two log lines about failed checks."""


async def keep(bus: Bus, config: ClusterConfig) -> None:
    """Create what is missing when `jetstream.missing` is set, and at least every 30 s; runs until cancelled."""
    reported = 0.0
    now = asyncio.get_running_loop().time
    while True:
        try:
            async with asyncio.timeout(CHECK_S):
                await bus.jetstream.missing.wait()
        except TimeoutError:
            pass  # a regular check
        bus.jetstream.missing.clear()
        try:
            created = await topology.init(bus, config)
        except (LoomError, LookupError, TypeError) as error:  # the latter two: a reply of an unexpected shape
            bus.jetstream.missing.set()
            if now() >= reported + REPORT_S:
                reported = now()
                log.warning("topology_not_restored", **error_fields(error))
        else:
            if created:
                log.warning("topology_restored", created=created)
        await asyncio.sleep(PAUSE_S)
