"""Announcements of node hosts, as far as they can be believed: the host in the subject is the host."""

import asyncio
import time

from loom.bus.client import Bus, Msg
from loom.bus.log import get_logger
from loom.schemas.auction import HostAnnouncement
from loom.schemas.wire import Undecodable, decode

log = get_logger()

MAX_HOSTS = 10_000
"""Hosts that a reader of announcements remembers at most."""
LOG_EVERY_S = 1.0


class AnnouncementReader:
    """Reads announcements, and counts and logs those it leaves out."""

    def __init__(self) -> None:
        self.left_out = 0
        """Announcements that could not be read or named another host than their subject."""
        self._log_at = 0.0

    def read(self, msg: Msg) -> HostAnnouncement | None:
        """Return the announcement; None for one that is left out."""
        host_id = msg.subject.rpartition(".")[2]
        try:
            announcement = decode(msg.data, HostAnnouncement)
        except Undecodable as error:
            self._leave_out(host_id, error.message)
            return None
        if announcement.host_id != host_id:
            self._leave_out(host_id, "the body names another host than the subject")
            return None
        return announcement

    def _leave_out(self, host_id: str, reason: str) -> None:
        self.left_out += 1
        now = time.monotonic()
        if now >= self._log_at:  # a flood must not fill the log
            self._log_at = now + LOG_EVERY_S
            log.warning("announcement_left_out", host_id=host_id, reason=reason, left_out=self.left_out)


async def announced_hosts(bus: Bus, within_s: float) -> list[HostAnnouncement]:
    """Ask the hosts to announce themselves, and return what came within `within_s` seconds, by host id."""
    reader = AnnouncementReader()
    found: dict[str, HostAnnouncement] = {}

    async def take(msg: Msg) -> None:
        announcement = reader.read(msg)
        if announcement is not None and (announcement.host_id in found or len(found) < MAX_HOSTS):
            found[announcement.host_id] = announcement

    subscription = await bus.subscribe(bus.subjects.of("host", "*"), take)
    await bus.publish(bus.subjects.hosts)
    await asyncio.sleep(within_s)
    await bus.unsubscribe(subscription)
    return [found[host_id] for host_id in sorted(found)]
