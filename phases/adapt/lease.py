"""A lease by which one of several replicas acts."""

from loom.bus.bus import Bus
from loom.bus.natsio.server_errors import Conflict
from loom.schemas.base import Undecodable
from loom.schemas.learning.lease import Lease

LEASE_S = 15.0  # longer than a host takes to announce what has changed


async def acquire_lease(bus: Bus, name: str) -> bool:
    """Acquire or renew a lease for this replica; return False while another replica holds it.

    Raises:
        BusUnavailable: The server has not answered.
    """
    leases, now = bus.bucket("tuning", Lease), bus.clock.now()
    try:
        entry = await leases.get(name)
    except Undecodable:
        entry, revision = None, await leases.revision(name)
    else:
        revision = entry.revision if entry else 0
    held = entry.value if entry is not None else Lease(holder="", until=0)
    # No replica acquires a longer lease than this, so that a forged one cannot block all replicas.
    if held.holder != bus.instance and now < held.until <= now + 2 * LEASE_S:
        return False
    renewed = Lease(holder=bus.instance, until=now + LEASE_S)
    try:
        await leases.update(name, renewed, revision)
    except Conflict:
        return False
    return True
