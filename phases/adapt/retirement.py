"""Retires spawned nodes that are idle or failing, one at a time; another node inherits their evidence."""

import asyncio
from collections.abc import Mapping

from loom.bus.bus import Bus
from loom.bus.hops.duplicates import store_once
from loom.bus.host_directory import AnnouncedHost, LiveHosts
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.requests import NoResponders
from loom.phases.adapt.lease import acquire_lease
from loom.phases.adapt.retirement_policy import (
    Retirement,
    due_retirements,
    heir,
    inherited_rewards,
)
from loom.phases.adapt.timings import AdaptTimings
from loom.schemas.auction import RetireReply, RetireRequest
from loom.schemas.base import Undecodable, decode
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import LoomError
from loom.schemas.identity import ADAPT
from loom.schemas.learning.profile import NodeProfile

log = get_logger()

REPLY_S = 1.0
MAX_REQUESTS = 4  # per sweep, so that a sweep ends well within the lease
LEASE = "apoptosis"


class RetirementSweeper:
    """Requests once a second the retirement of the first due node, and publishes what its heir inherits.

    Of several replicas only the one that holds the lease acts.

    Args:
        bus: A connected bus.
        config: Limits of idle time and failures, and the least number of nodes.
        profiles: A live read-only view of the profiles, by key.
        timings: Intervals of ADAPT.
    """

    def __init__(
        self, bus: Bus, config: ClusterConfig, profiles: Mapping[str, NodeProfile], timings: AdaptTimings
    ) -> None:
        self._bus = bus
        self._timings = timings
        self._config = config
        self._profiles = profiles
        self._live_hosts = LiveHosts(bus)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Subscribe to announcements, and start to sweep."""
        await self._live_hosts.start()
        self._task = self._bus.tasks.spawn(self._run(), name="retire nodes", essential=True)

    async def stop(self) -> None:
        """Stop sweeping."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._live_hosts.stop()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._timings.sweep_s)
            try:
                await self._sweep()
            except LoomError as error:
                log.warning("retirement_sweep_failed", **error_fields(error))

    def _hosts(self) -> list[AnnouncedHost]:
        return [host for host in self._live_hosts.hosts() if not host.draining]

    async def _sweep(self) -> None:
        """Retire the first due node whose host accepts the request."""
        due = due_retirements(self._hosts(), self._profiles, self._config)[:MAX_REQUESTS]
        if not due or not await acquire_lease(self._bus, LEASE, self._timings.lease_s):
            return
        for retirement in due:
            if await self._retire(retirement):
                await self._publish_inheritance(retirement.key)
                return

    async def _retire(self, retirement: Retirement) -> bool:
        """Request the retirement from the node's host; return whether the host has accepted it."""
        host, node_id = retirement.host, retirement.node_id
        request = RetireRequest(node_id=node_id, reason=retirement.reason, when_idle=retirement.when_idle)
        try:
            msg = await self._bus.requests.request(self._bus.subjects.of("retire", *host), request, timeout_s=REPLY_S)
        except (TimeoutError, NoResponders):
            log.info("node_retirement_unanswered", node_id=node_id, host=str(host))
            return False
        try:
            reply = decode(msg.data, RetireReply)
        except Undecodable as error:  # a node of another host may be due as well
            self._bus.discards.add_from_host(str(host), "answers", "retire_reply_undecodable", reason=error.message)
            return False
        if reply.decline is not None:
            log.debug("node_retirement_declined", node_id=node_id, decline=reply.decline)
            return False
        log.info("node_retirement_requested", node_id=node_id, host=str(host), reason=retirement.reason)
        self._live_hosts.mark_retiring(host, node_id)
        return True

    async def _publish_inheritance(self, key: str) -> None:
        """Publish the evidence of a retired node as rewards of its heir."""
        profile = self._profiles.get(key)
        heir_id = None if profile is None else heir(profile, self._hosts(), self._profiles)
        if profile is None or heir_id is None:
            return
        for reward in inherited_rewards(profile, profile.owner, heir_id):
            subject = self._bus.subjects.of("reward", ADAPT, reward.owner, heir_id, reward.domain_token)
            await store_once(self._bus, subject, reward, msg_id=f"{reward.reward_id}:{reward.domain_token}")
        log.info("node_retirement_inherited", node=profile.name, heir=heir_id)
