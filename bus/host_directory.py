"""Announcements of node hosts: the owner and the host are those of the subject."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from msgspec import structs

from loom.bus.bus import Bus
from loom.bus.logs.discards import Discards
from loom.bus.natsio.transport.message import Msg
from loom.schemas.auction import MAX_ANNOUNCEMENT_BYTES, HostAnnouncement
from loom.schemas.base import Undecodable, decode
from loom.schemas.identity import LOCAL_OWNER, qualified
from loom.schemas.tokens import Token

MAX_HOSTS = 10_000
"""Hosts that a reader of announcements remembers at most."""
HEARD_S = 10.0
"""A host that has not announced itself for so long has gone."""


class HostKey(NamedTuple):
    """Which host of which owner."""

    owner: str
    host_id: str

    def __str__(self) -> str:
        return qualified(self.owner, self.host_id)


class AnnouncedHost(HostAnnouncement, frozen=True, kw_only=True):
    """An announcement and the host that has published it."""

    owner: Token = LOCAL_OWNER
    host_id: Token

    @property
    def key(self) -> HostKey:
        """The host and its owner."""
        return HostKey(self.owner, self.host_id)

    @property
    def name(self) -> str:
        """The host as people write it."""
        return qualified(self.owner, self.host_id)


def host_in(subject: str) -> HostKey:
    """Return the host that a subject of the form `….<owner>.<host_id>` names."""
    _, owner, host_id = subject.rsplit(".", 2)
    return HostKey(owner, host_id)


class AnnouncementReader:
    """Reads announcements; counts and logs those that cannot be read, ignores those that are overtaken.

    Args:
        discards: Where they are counted.
        clock: Returns seconds that never go back.
    """

    def __init__(self, discards: Discards, clock: Callable[[], float] = time.monotonic) -> None:
        self._discards = discards
        self._clock = clock
        self._last: OrderedDict[HostKey, tuple[int, float]] = OrderedDict()
        """Host -> `seq` of its last announcement and when that came; the one longest silent first."""

    def read(self, msg: Msg) -> AnnouncedHost | None:
        """Return the announcement; None for one that is left out."""
        key = host_in(msg.subject)
        try:
            announcement = decode(msg.data, HostAnnouncement, limit=MAX_ANNOUNCEMENT_BYTES)
        except Undecodable as error:
            self._discards.of_host(str(key), "announcements", "announcement_undecodable", reason=error.message)
            return None
        if self._is_overtaken(key, announcement.seq):
            return None
        return AnnouncedHost(owner=key.owner, host_id=key.host_id, **structs.asdict(announcement))

    def _is_overtaken(self, key: HostKey, seq: int) -> bool:
        """Return whether a later announcement of the host has come; a host that was silent for 10 s begins again."""
        now = self._clock()
        last, at = self._last.get(key, (0, now))
        if seq < last and now - at < HEARD_S:
            return True
        self._last[key] = (seq, now)
        self._last.move_to_end(key)
        if len(self._last) > MAX_HOSTS:
            self._last.popitem(last=False)
        return False


async def announced_hosts(bus: Bus, within_s: float) -> list[AnnouncedHost]:
    """Ask the hosts to announce themselves; return those that did so within `within_s` seconds, by owner and id."""
    reader = AnnouncementReader(bus.discards)
    hosts: dict[HostKey, AnnouncedHost] = {}

    async def take(msg: Msg) -> None:
        host = reader.read(msg)
        if host is not None and (host.key in hosts or len(hosts) < MAX_HOSTS):
            hosts[host.key] = host

    subscription = await bus.connection.subscribe(bus.subjects.of("host", "*", "*"), take)
    await bus.connection.publish(bus.subjects.hosts)
    await asyncio.sleep(within_s)
    bus.connection.unsubscribe(subscription)
    return [hosts[key] for key in sorted(hosts)]
