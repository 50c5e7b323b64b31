"""Asking for one more node, where none or only a full one is there."""

import time

import structlog

from loom.bus.client import Bus, NoResponders
from loom.schemas.auction import SpawnReply, SpawnRequest
from loom.schemas.envelope import Award, Envelope
from loom.schemas.errors import LoomError
from loom.schemas.wire import decode

log = structlog.get_logger()

ASK_EVERY_S = 1.0  # a node takes about this long to start and to be seen bidding
ANSWER_S = 0.5


class NodeRequests:
    """Requests to hosts that can start nodes: at most one a second for each domain."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._asked: dict[str, float] = {}

    def ask(self, envelope: Envelope, *, saturated: bool) -> None:
        """Ask for a node for the task's domain; the task does not wait for the answer."""
        now = time.monotonic()
        if now - self._asked.get(envelope.slug, -ASK_EVERY_S) < ASK_EVERY_S:
            return
        self._asked = {slug: at for slug, at in self._asked.items() if now - at < ASK_EVERY_S}
        self._asked[envelope.slug] = now
        request = SpawnRequest(
            slug=envelope.slug,
            required_tools=envelope.ad.required_tools,
            reason="saturated" if saturated else "no_bids",
            task_id=envelope.task_id,
        )
        self._bus.spawn(self._request(request), name="spawn request")

    async def _request(self, request: SpawnRequest) -> None:
        try:
            msg = await self._bus.request(self._bus.subjects.spawn, request, timeout_s=ANSWER_S)
            reply = decode(msg.data, SpawnReply)
        except (TimeoutError, NoResponders):
            log.info("no_host_can_spawn", slug=request.slug, reason=request.reason)
        except LoomError as error:
            log.warning("spawn_request_failed", slug=request.slug, reason=error.message)
        else:
            log.info("node_requested", slug=request.slug, node_id=reply.node_id, declined=reply.decline)


def is_saturated(award: Award) -> bool:
    """Return whether the winner has no slot free: the task will queue."""
    return award.backlog > 0 or any(
        bid.load >= 1 for bid in award.bids if (bid.node_id, bid.host_id) == (award.node_id, award.host_id)
    )
