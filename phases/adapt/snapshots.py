"""Publishes every profile into the stream of rewards before its head is dropped; a rebuild starts from there."""

import asyncio
import time
from collections.abc import Iterator
from itertools import islice

from loom.bus.bus import Bus
from loom.bus.hops.duplicates import store_once
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.stored_message import StoredMessage
from loom.phases.adapt.concurrency import CONCURRENT, for_each
from loom.phases.adapt.lease import acquire_lease
from loom.phases.adapt.profile_store import ProfileStore
from loom.phases.adapt.timings import AdaptTimings
from loom.schemas.base import encode
from loom.schemas.errors import LoomError
from loom.schemas.identity import ADAPT
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import SNAPSHOTS, Reward, Snapshot

log = get_logger()

SHARE = 0.25
"""Share of the stream's size limit that may fill between two rounds."""
ROUND_SHARE = 0.35
"""Share that one round may take: the stream holds a complete round, what came since, and the next round."""
OVERHEAD_BYTES = 256
"""Bytes that the server may store for a message in addition to body and subject: headers and its own entry."""
NEAR = 1000
"""Messages that a reader near the end of the stream may still have to read."""
ROUNDS = 2
"""Incomplete rounds that are followed at a time: replicas publish one each if a lease has run out."""
LEASE = "snapshots"


class Snapshots:
    """Publishes a round of snapshots each time the stream has grown enough since the last complete round.

    Every replica counts what it reads, so that any of them knows when the next round is due.

    Args:
        bus: A connected bus.
        profiles: The live profiles, by key.
        timings: Intervals of ADAPT.
    """

    def __init__(self, bus: Bus, profiles: ProfileStore, timings: AdaptTimings) -> None:
        self._bus = bus
        self._timings = timings
        self._profiles = profiles
        self._limit = 0
        self._read_to = 0
        self._since = 0
        """Bytes read since the last complete round."""
        self._rounds: dict[int, tuple[set[str], int]] = {}
        """Sequence at which an incomplete round was taken -> its nodes and bytes read so far."""
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the size limit of the stream, and start to publish rounds."""
        info = await self._bus.jetstream.api(f"STREAM.INFO.{self._bus.subjects.stream('REWARDS')}")
        self._limit = max(0, int(info["config"].get("max_bytes", 0)))
        if self._limit:
            self._task = self._bus.tasks.spawn(self._publish_when_due(), name="publish snapshots", essential=True)

    def on_stream_reset(self) -> None:
        """Count from zero, for a new stream that has replaced a lost one."""
        self._read_to, self._since, self._rounds = 0, 0, {}
        self._due.clear()

    async def stop(self) -> None:
        """Stop publishing."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def count(self, message: StoredMessage, reward: Reward | None) -> None:
        """Count a message that has been read, after its reward, if any, was applied."""
        self._read_to = message.seq
        size = len(message.data) + len(message.subject) + OVERHEAD_BYTES
        if reward is not None and reward.snapshot is not None:
            self._count_part(reward.snapshot, size)
        else:
            self._since += size
        if self._since > SHARE * self._limit and message.pending < NEAR:  # otherwise a complete round may still follow
            self._due.set()

    def _count_part(self, part: Snapshot, size: int) -> None:
        """Count a snapshot; those of a round count like other messages once two newer rounds have begun."""
        nodes, size_before = self._rounds.pop(part.through, (set(), 0))
        nodes.add(part.profile.key)
        if len(nodes) >= part.nodes:
            self._since = 0
            self._due.clear()
            return
        self._rounds[part.through] = nodes, size_before + size
        if len(self._rounds) > ROUNDS:
            _, abandoned = self._rounds.pop(next(iter(self._rounds)))
            self._since += abandoned

    async def _publish_when_due(self) -> None:
        while True:
            await self._due.wait()
            try:
                if await acquire_lease(self._bus, LEASE, self._timings.lease_s):
                    await self._publish()
            except LoomError as error:
                log.warning("snapshots_failed", **error_fields(error))
            await asyncio.sleep(self._timings.snapshot_retry_s)  # meanwhile every replica reads the round

    async def _publish(self) -> None:
        """Publish a round: all profiles of one moment, and the sequence up to which they contain every reward."""
        through, profiles = self._read_to, self._profiles.copy()
        size = 0
        for snapshot in _snapshots(profiles, through):
            size += len(encode(snapshot)) + OVERHEAD_BYTES
            await asyncio.sleep(0)  # a large profile takes milliseconds to encode
        if size > ROUND_SHARE * self._limit:
            log.warning("snapshots_too_large", bytes=size, limit=self._limit)
            return
        renewed_at = time.monotonic()
        rest = _snapshots(profiles, through)
        while snapshots := list(islice(rest, CONCURRENT)):
            if time.monotonic() > renewed_at + self._timings.lease_s / 3:
                if not await acquire_lease(self._bus, LEASE, self._timings.lease_s):
                    return
                renewed_at = time.monotonic()
            await for_each(snapshots, self._store)
        log.info("snapshots_published", nodes=len(profiles), bytes=size, through=through)

    async def _store(self, snapshot: Reward) -> None:
        subject = self._bus.subjects.of("reward", ADAPT, snapshot.owner, snapshot.node_id, SNAPSHOTS)
        await store_once(self._bus, subject, snapshot, msg_id=snapshot.reward_id)


def _snapshots(profiles: ProfileStore, through: int) -> Iterator[Reward]:
    """Yield the snapshot of each profile; only one of them is decoded at a time."""
    return (snapshot_of(profiles[key], through, len(profiles)) for key in profiles)


def snapshot_of(profile: NodeProfile, through: int, nodes: int) -> Reward:
    """Return the snapshot of a profile that contains all rewards of its node up to sequence `through`."""
    return Reward(
        reward_id=f"snapshot:{profile.name}:{through}",
        kind="snapshot",
        task_id=profile.node_id,
        attempt=0,
        source=ADAPT,
        node_id=profile.node_id,
        owner=profile.owner,
        domain_token=SNAPSHOTS,
        score=profile.success_rate,
        ended_at=profile.updated_at,
        snapshot=Snapshot(through=through, nodes=nodes, profile=profile),
    )
