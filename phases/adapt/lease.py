"""A lease by which one of several replicas acts."""

from loom.bus.bus import Bus
from loom.bus.natsio.server_errors import Conflict
from loom.schemas.base import Undecodable
from loom.schemas.learning.lease import Lease


async def acquire_lease(bus: Bus, name: str, lease_s: float) -> bool:
    """Acquire or renew a lease for this replica; return False while another replica holds it.

    Args:
        bus: A connected bus.
        name: Name of the lease.
        lease_s: Seconds for which the lease is valid.

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
    if held.holder != bus.instance and now < held.until <= now + 2 * lease_s:
        return False
    renewed = Lease(holder=bus.instance, until=now + lease_s)
    try:
        await leases.update(name, renewed, revision)
    except Conflict:
        return False
    return True
