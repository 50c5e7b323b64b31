"""A start that is tried again while the server is not ready."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from loom.bus.logs.logger import get_logger
from loom.bus.wire_version import WireMismatch
from loom.schemas.errors import LoomError

log = get_logger()
T = TypeVar("T")

RETRY_S = 0.5
REPORT_S = 10.0
"""Seconds between two log lines about what a start waits for."""


async def until_started(start: Callable[[], Awaitable[T]], *, patience_s: float) -> T:
    """Return what `start` returns; while it fails it is called again, for at most `patience_s` seconds.

    A server may be frozen or without a leader, or the streams may not be there yet.

    Args:
        start: Leaves nothing behind when it fails.

    Raises:
        LoomError, TimeoutError: `start` still fails after that time.
        WireMismatch: `start` has found another wire version; it is called once then.
    """
    began, reported = time.monotonic(), 0.0
    while True:
        try:
            return await start()
        except WireMismatch:
            raise
        except (LoomError, TimeoutError) as error:
            now = time.monotonic()
            if now >= began + patience_s:
                raise
            if not reported or now >= reported + REPORT_S:
                reported = now
                log.warning("start_waits", waiting_s=round(now - began), reason=getattr(error, "message", str(error)))
        await asyncio.sleep(RETRY_S)
