"""Asking for one more node, where none or only a full one is there."""

import asyncio
import time

from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.requests import NoResponders
from loom.schemas.auction import DESCRIPTION_BYTES, SpawnReply, SpawnRequest
from loom.schemas.base import cut_utf8, decode
from loom.schemas.envelope import Envelope
from loom.schemas.errors import LoomError

log = get_logger()

ASK_EVERY_S = 1.0  # a node takes about this long to start and to be seen bidding
ANSWER_S = 0.5
PAUSES_S = (0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 4.0)
"""Seconds before each request for a task without bids, while hosts decline as unqualified. The server picks one of the
hosts, and another may be qualified; a host that has a model choose a skill is qualified when the model has answered."""


class SpawnRequests:
    """Requests to hosts that can start nodes: at most one a second for each domain.

    Where nobody bids, tasks that say different things are asked about each: one may call for a skill, another not.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._asked: dict[tuple[object, ...], float] = {}
        """What was asked within the last second, the oldest first."""

    def ask(self, envelope: Envelope, *, saturated: bool) -> None:
        """Ask for a node for the task's domain; the task does not wait for the answer."""
        request = SpawnRequest(
            domain_token=envelope.domain_token,
            required_tools=envelope.ad.required_tools,
            description=cut_utf8(envelope.ad.description, DESCRIPTION_BYTES)[0],
            reason="saturated" if saturated else "no_bids",
            task_id=envelope.task_id,
        )
        now = time.monotonic()
        what = (
            (request.domain_token,)
            if saturated
            else (request.domain_token, request.required_tools, request.description)
        )
        while self._asked and now - next(iter(self._asked.values())) >= ASK_EVERY_S:
            del self._asked[next(iter(self._asked))]
        if what in self._asked:
            return
        self._asked[what] = now
        self._bus.tasks.spawn(self._request(request), name="spawn request")

    async def _request(self, request: SpawnRequest) -> None:
        try:
            reply = await self._answer(request)
        except (TimeoutError, NoResponders):
            log.info("no_host_can_spawn", domain_token=request.domain_token, reason=request.reason)
        except LoomError as error:
            log.warning("spawn_request_failed", domain_token=request.domain_token, reason=error.message)
        else:
            log.info("node_requested", domain_token=request.domain_token, node_id=reply.node_id, declined=reply.decline)

    async def _answer(self, request: SpawnRequest) -> SpawnReply:
        """Return the reply of a host; while it is `unqualified` and the task has no bids, the last of several."""
        reply = await self._ask_one(request)
        for pause_s in PAUSES_S[1:]:
            if reply.decline != "unqualified" or request.reason == "saturated":
                break
            await asyncio.sleep(pause_s)
            reply = await self._ask_one(request)
        return reply

    async def _ask_one(self, request: SpawnRequest) -> SpawnReply:
        msg = await self._bus.requests.request(self._bus.subjects.spawn, request, timeout_s=ANSWER_S)
        return decode(msg.data, SpawnReply)
