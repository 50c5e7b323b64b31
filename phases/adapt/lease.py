"""One of several replicas acts."""

from loom.bus.client import Bus, Conflict
from loom.bus.kv import Bucket
from loom.schemas.learning import Lease

LEASE_S = 15.0  # longer than a host takes to announce what has changed


async def take_lease(bus: Bus, name: str) -> bool:
    """Take or renew the lease of that name; False while it is another's.

    Raises:
        BusUnavailable: No answer.
    """
    leases, now = Bucket(bus, "tuning", Lease), bus.now()
    entry = await leases.get(name)
    if entry is not None and entry.value.holder != bus.instance and entry.value.until > now:
        return False
    mine = Lease(holder=bus.instance, until=now + LEASE_S)
    try:
        await leases.update(name, mine, entry.revision if entry else 0)
    except Conflict:
        return False
    return True
