"""The streams of a namespace, for processes that do not create them."""

from loom.bus import topology
from loom.bus.bus import Bus
from loom.schemas.config import ClusterConfig


async def create_streams(url: str, namespace: str = "loom") -> None:
    """Create streams, buckets and consumers, as `loom init` does."""
    async with Bus(url, namespace=namespace) as bus:
        await topology.apply(bus, ClusterConfig())
