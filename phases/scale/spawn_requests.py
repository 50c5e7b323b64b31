"""Requests for one more node, where no node bids or the winner is full."""

import asyncio

from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.requests import NoResponders
from loom.phases.shared.pace import Pace
from loom.schemas.auction import DESCRIPTION_BYTES, SpawnReply, SpawnRequest
from loom.schemas.base import cut_utf8, decode
from loom.schemas.envelope import Envelope
from loom.schemas.errors import LoomError

log = get_logger()

REPLY_WITHIN_S = 0.5
RETRY_PAUSES_S = (0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 4.0)
"""Seconds before each request for a task without offers, while hosts decline as unqualified.

The server picks one of the hosts, and another host may be qualified. A host that lets a model choose a skill is
qualified once the model has answered.
"""


class SpawnRequests:
    """Sends requests to hosts that can start nodes: at most one per second and domain.

    For tasks without offers the limit is per domain, tools and description, because only some of them may call for a
    skill.

    Args:
        bus: A connected bus.
        interval_s: Seconds between two requests of the same kind.
    """

    def __init__(self, bus: Bus, interval_s: float) -> None:
        self._bus = bus
        self._pace = Pace(interval_s)

    def request(self, envelope: Envelope, *, saturated: bool) -> None:
        """Request a node for the task's domain in the background."""
        request = SpawnRequest(
            domain_token=envelope.domain_token,
            required_tools=envelope.ad.required_tools,
            description=cut_utf8(envelope.ad.description, DESCRIPTION_BYTES)[0],
            reason="saturated" if saturated else "no_bids",
            task_id=envelope.task_id,
        )
        kind = (
            (request.domain_token,)
            if saturated
            else (request.domain_token, request.required_tools, request.description)
        )
        if self._pace.allows(kind):
            self._bus.tasks.spawn(self._request_and_log(request), name="spawn request")

    async def _request_and_log(self, request: SpawnRequest) -> None:
        try:
            reply = await self._request_with_retries(request)
        except (TimeoutError, NoResponders):
            log.info("no_host_can_spawn", domain_token=request.domain_token, reason=request.reason)
        except LoomError as error:
            log.warning("spawn_request_failed", domain_token=request.domain_token, reason=error.message)
        else:
            log.info("node_requested", domain_token=request.domain_token, node_id=reply.node_id, declined=reply.decline)

    async def _request_with_retries(self, request: SpawnRequest) -> SpawnReply:
        """Return the reply of a host; for a task without offers, retry while hosts reply `unqualified`."""
        reply = await self._request_once(request)
        for pause_s in RETRY_PAUSES_S[1:]:
            if reply.decline != "unqualified" or request.reason == "saturated":
                break
            await asyncio.sleep(pause_s)
            reply = await self._request_once(request)
        return reply

    async def _request_once(self, request: SpawnRequest) -> SpawnReply:
        msg = await self._bus.requests.request(self._bus.subjects.spawn, request, timeout_s=REPLY_WITHIN_S)
        return decode(msg.data, SpawnReply)
