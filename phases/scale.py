"""Scale: ask for a node where one is missing, and pass the task on.

Consumes   task.scale.*.*
Publishes  spawn             a request for one more node, to hosts that can start some
           task.execute      the envelope as it came; task.match when it came without an award
State      none
Gives up   deadline_exceeded
"""

import time

import structlog

from loom.bus.client import Bus, NoResponders
from loom.bus.delivery import Delivery
from loom.bus.loop import SLOTS, HopLoop, Service
from loom.bus.outcome import Dead, Fail, Next, Outcome
from loom.bus.topology import SCALE_LANE
from loom.schemas.auction import SpawnRequest
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Award, Envelope
from loom.schemas.errors import LoomError
from loom.schemas.task import TaskError

log = structlog.get_logger()

ASK_EVERY_S = 1.0  # a node takes about this long to start and to be seen bidding
ANSWER_S = 0.5


class Scale:
    """The third phase."""

    def __init__(self, bus: Bus, config: ClusterConfig) -> None:
        self._bus = bus
        self._config = config
        self._asked: dict[str, float] = {}
        self._loop = HopLoop(bus, Service("scale", [(SCALE_LANE, SLOTS)], Envelope, self.handle))

    async def start(self) -> None:
        """Begin to pass tasks on."""
        await self._loop.start()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, finish for at most `timeout_s`."""
        await self._loop.drain(timeout_s)

    async def handle(self, envelope: Envelope, _delivery: Delivery) -> Outcome:
        """Ask for a node when none or only a saturated one is there, and pass the task on."""
        if envelope.spec is None:
            return Dead("the envelope came without a spec")
        if self._bus.now() >= envelope.deadline:
            return Fail(
                TaskError(code="deadline_exceeded", message="the deadline passed before the run began"), envelope
            )
        if envelope.award is None:
            self._ask_for_node(envelope, saturated=False)
            return Next("match", envelope)
        if is_saturated(envelope.award):
            self._ask_for_node(envelope, saturated=True)
        return Next("execute", envelope)

    def _ask_for_node(self, envelope: Envelope, *, saturated: bool) -> None:
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
        self._bus.spawn(self._request(request), name="spawn request")  # the task does not wait for the answer

    async def _request(self, request: SpawnRequest) -> None:
        try:
            await self._bus.request(self._bus.subjects.spawn, request, timeout_s=ANSWER_S)
        except (TimeoutError, NoResponders):
            log.info("no_host_can_spawn", slug=request.slug, reason=request.reason)
        except LoomError as error:
            log.warning("spawn_request_failed", slug=request.slug, reason=error.message)
        else:
            log.info("node_requested", slug=request.slug, reason=request.reason)


def is_saturated(award: Award) -> bool:
    """Return whether the winner has no slot free: the task will queue."""
    return award.backlog > 0 or any(
        bid.load >= 1 for bid in award.bids if (bid.node_id, bid.host_id) == (award.node_id, award.host_id)
    )
