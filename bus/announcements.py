"""Announcements of node hosts, as far as they can be believed: the host in the subject is the host."""

import asyncio

from loom.bus.client import Bus, Msg
from loom.bus.discards import Discards
from loom.schemas.auction import HostAnnouncement
from loom.schemas.wire import Undecodable, decode

MAX_HOSTS = 10_000
"""Hosts that a reader of announcements remembers at most."""


class AnnouncementReader:
    """Reads announcements, and counts and logs those it leaves out.

    Args:
        discards: Where they are counted.
    """

    def __init__(self, discards: Discards) -> None:
        self._discards = discards

    def read(self, msg: Msg) -> HostAnnouncement | None:
        """Return the announcement; None for one that is left out."""
        host_id = msg.subject.rpartition(".")[2]
        try:
            announcement = decode(msg.data, HostAnnouncement)
        except Undecodable as error:
            self._discards.of_host(host_id, "announcements", "announcement_undecodable", reason=error.message)
            return None
        if announcement.host_id != host_id:
            reason = f"the body names the host {announcement.host_id}"
            self._discards.of_host(host_id, "announcements", "announcement_of_another_host", reason=reason)
            return None
        return announcement


async def announced_hosts(bus: Bus, within_s: float) -> list[HostAnnouncement]:
    """Ask the hosts to announce themselves, and return what came within `within_s` seconds, by host id."""
    reader = AnnouncementReader(bus.discards)
    found: dict[str, HostAnnouncement] = {}

    async def take(msg: Msg) -> None:
        announcement = reader.read(msg)
        if announcement is not None and (announcement.host_id in found or len(found) < MAX_HOSTS):
            found[announcement.host_id] = announcement

    subscription = await bus.subscribe(bus.subjects.of("host", "*", "*"), take)
    await bus.publish(bus.subjects.hosts)
    await asyncio.sleep(within_s)
    await bus.unsubscribe(subscription)
    return [found[host_id] for host_id in sorted(found)]
