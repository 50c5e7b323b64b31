"""Publishing of a host that continues after a failure, and its lifecycle messages."""

import asyncio
from collections.abc import Awaitable, Callable

from loom.agents.user_code import ends_task, error_fields
from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.schemas.errors import LoomError
from loom.schemas.learning.lifecycle import Lifecycle, LifecycleKind

log = get_logger()


async def repeat_every(seconds: float, publish: Callable[[], Awaitable[None]]) -> None:
    """Call `publish` every so many seconds until cancelled; failures are logged."""
    while True:
        await asyncio.sleep(seconds)
        await log_failures(publish)


async def log_failures(publish: Callable[[], Awaitable[None]]) -> None:
    """Call `publish` and log its failure; a lost connection or a failing node does not end the host's other work."""
    try:
        await publish()
    except LoomError as error:
        log.warning("announce_failed", reason=error.message)
    except BaseException as error:  # a node may be of a user's class, which may raise anything
        if ends_task(error):
            raise
        log.error("node_raised", **error_fields(error))


async def publish_lifecycle(bus: Bus, kind: LifecycleKind, node_id: str, host_id: str, reason: str = "") -> None:
    """Publish a lifecycle message for a node of this owner.

    Args:
        host_id: The host that has the node.
        reason: A note for people.
    """
    owner = bus.identity.owner
    message = Lifecycle(kind=kind, node_id=node_id, owner=owner, host_id=host_id, at=bus.clock.now(), reason=reason)
    await bus.connection.publish(bus.subjects.of("lifecycle", owner, kind, owner, node_id), message)
