"""One of several replicas acts."""

from loom.bus.bus import Bus
from loom.bus.natsio.server_errors import Conflict
from loom.schemas.base import Undecodable
from loom.schemas.learning import Lease

LEASE_S = 15.0  # longer than a host takes to announce what has changed


async def take_lease(bus: Bus, name: str) -> bool:
    """Take or renew the lease of that name; False while it is another's.

    Raises:
        BusUnavailable: No answer.
    """
    leases, now = bus.bucket("tuning", Lease), bus.clock.now()
    try:
        entry = await leases.get(name)
    except Undecodable:
        entry, revision = None, await leases.revision(name)
    else:
        revision = entry.revision if entry else 0
    held = entry.value if entry is not None else Lease(holder="", until=0)
    # A longer lease than any replica takes is not a replica's: it would be held by no process.
    if held.holder != bus.instance and now < held.until <= now + 2 * LEASE_S:
        return False
    mine = Lease(holder=bus.instance, until=now + LEASE_S)
    try:
        await leases.update(name, mine, revision)
    except Conflict:
        return False
    return True
