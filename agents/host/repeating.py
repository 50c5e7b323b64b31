"""What a host publishes again and again, whatever becomes of one time."""

import asyncio
from collections.abc import Awaitable, Callable

from loom.agents.user_code import ends_task, error_text_fields
from loom.bus.logs.logger import get_logger
from loom.schemas.errors import LoomError

log = get_logger()


async def every(seconds: float, act: Callable[[], Awaitable[None]]) -> None:
    """Attempt something every so many seconds, without end."""
    while True:
        await asyncio.sleep(seconds)
        await attempt(act)


async def attempt(act: Callable[[], Awaitable[None]]) -> None:
    """Publish something; a connection that is gone, or a node's own fault, does not end the host's other work."""
    try:
        await act()
    except LoomError as error:
        log.warning("host_silenced", reason=error.message)
    except BaseException as error:  # a node may be a user's class, whose faults are its own
        if ends_task(error):
            raise
        log.error("node_raised", **error_text_fields(error))
