"""Has children retired that are idle or failing, one at a time, and passes on what they have learned."""

import asyncio
from collections.abc import Mapping

from loom.bus.bus import Bus
from loom.bus.hops.duplicates import store_once
from loom.bus.host_directory import AnnouncedHost, LiveHosts
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.requests import NoResponders
from loom.phases.adapt.lease import take_lease
from loom.phases.adapt.retirement_policy import Retirement, bequest, heir, who_retires
from loom.schemas.auction import RetireReply, RetireRequest
from loom.schemas.base import Undecodable, decode
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import LoomError
from loom.schemas.identity import ADAPT
from loom.schemas.learning import NodeProfile

log = get_logger()

SWEEP_S = 1.0
ANSWER_S = 1.0
TRIES = 4  # hosts asked in one sweep, so that it is over well within the lease
LEASE = "apoptosis"


class Retiring:
    """ADAPT's other half. Of several replicas only the one that holds the lease acts.

    Args:
        profiles: What has been learned, as it is now, by key.
    """

    def __init__(self, bus: Bus, config: ClusterConfig, profiles: Mapping[str, NodeProfile]) -> None:
        self._bus = bus
        self._config = config
        self._profiles = profiles
        self._live_hosts = LiveHosts(bus)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to look after the nodes."""
        await self._live_hosts.start()
        self._task = self._bus.tasks.spawn(self._watch(), name="retire nodes", essential=True)

    async def stop(self) -> None:
        """Retire nobody any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._live_hosts.stop()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self._sweep()
            except LoomError as error:
                log.warning("nobody_retired", **error_fields(error))

    def _hosts(self) -> list[AnnouncedHost]:
        return [host for host in self._live_hosts.hosts() if not host.draining]

    async def _sweep(self) -> None:
        """Have the first due child retired that its host lets go."""
        due = who_retires(self._hosts(), self._profiles, self._config)[:TRIES]
        if not due or not await take_lease(self._bus, LEASE):
            return
        for one in due:
            if await self._retire(one):
                await self._pass_on(one.key)
                return

    async def _retire(self, one: Retirement) -> bool:
        """Ask its host; return whether the child is on its way out."""
        order = RetireRequest(node_id=one.node_id, reason=one.reason, when_idle=one.when_idle)
        subject = self._bus.subjects.of("retire", *one.host)
        try:
            answer = await self._bus.requests.request(subject, order, timeout_s=ANSWER_S)
        except (TimeoutError, NoResponders):
            log.info("host_does_not_answer", host=str(one.host), node_id=one.node_id)
            return False
        try:
            reply = decode(answer.data, RetireReply)
        except Undecodable as error:  # another host's child may be due as well
            self._bus.discards.of_host(str(one.host), "answers", "retire_reply_undecodable", reason=error.message)
            return False
        if reply.decline is not None:
            log.debug("retirement_declined", node_id=one.node_id, decline=reply.decline)
            return False
        log.info("node_retires", node_id=one.node_id, host=str(one.host), reason=one.reason)
        self._live_hosts.mark_retiring(one.host, one.node_id)
        return True

    async def _pass_on(self, key: str) -> None:
        """Publish what the node has learned for its heir to fold."""
        profile = self._profiles.get(key)
        to = None if profile is None else heir(profile, self._hosts(), self._profiles)
        if profile is None or to is None:
            return
        for reward in bequest(profile, profile.owner, to):
            subject = self._bus.subjects.of("reward", ADAPT, reward.owner, to, reward.domain_token)
            await store_once(self._bus, subject, reward, msg_id=f"{reward.reward_id}:{reward.domain_token}")
        log.info("inherited", node=profile.name, heir=to)
