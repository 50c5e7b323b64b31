"""Streams, buckets and consumers that vanish under running phases are created again."""

import asyncio

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import LoomError

log = get_logger()

LOOK_S = 30.0
"""Seconds between two looks without a sign that something is missing."""
PAUSE_S = 0.5
"""Least time between two looks: many requests fail at once when a store is lost."""
REPORT_S = 10.0
"""Seconds between two log lines about the same trouble."""


async def keep(bus: Bus, config: ClusterConfig) -> None:
    """Create what is missing whenever `jetstream.missing` is set, and look every 30 s besides; runs until cancelled."""
    reported = 0.0
    now = asyncio.get_running_loop().time
    while True:
        try:
            async with asyncio.timeout(LOOK_S):
                await bus.jetstream.missing.wait()
        except TimeoutError:
            pass  # nothing has asked for it: a regular look
        bus.jetstream.missing.clear()
        try:
            created = await topology.init(bus, config)
        except (LoomError, LookupError, TypeError) as error:  # the latter: an answer of another shape
            bus.jetstream.missing.set()
            if now() >= reported + REPORT_S:
                reported = now()
                log.warning("topology_not_restored", **error_fields(error))
        else:
            if created:
                log.warning("topology_restored", created=created)
        await asyncio.sleep(PAUSE_S)
