"""Puts what is known of each node at the stream's end before its head is dropped: a rebuild starts there."""

import asyncio
from collections.abc import Mapping

from loom.bus.bus import Bus
from loom.bus.hops.duplicates import store_once
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.ordered_consumer import Stored
from loom.phases.adapt.lease import take_lease
from loom.schemas.base import encode
from loom.schemas.errors import LoomError
from loom.schemas.identity import ADAPT
from loom.schemas.learning import SNAPSHOTS, NodeProfile, Reward, Snapshot

log = get_logger()

SHARE = 0.25
"""Share of the stream's limit that fills up between two rounds; one round may take as much itself."""
OVERHEAD_BYTES = 256
"""What the server may store of a message besides body and subject: headers and its own entry."""
NEAR = 1000
"""Messages that a reader at the end of the stream may still have before it."""
RETRY_S = 30.0  # longer than a lease: who began a round has finished it by then, or is gone
LEASE = "snapshots"


class Snapshots:
    """Publishes a round of snapshots whenever enough has come since the last finished one.

    Every replica counts what it reads, so whoever takes over knows when the next one is due.

    Args:
        profiles: What has been learned, as it is now.
    """

    def __init__(self, bus: Bus, profiles: Mapping[str, NodeProfile]) -> None:
        self._bus = bus
        self._profiles = profiles
        self._limit = 0
        self._read_to = 0
        self._since = 0
        """Bytes read since the last finished round."""
        self._round: tuple[int, set[str]] = (0, set())
        """Where the round that is being read was taken, and the nodes of it read so far."""
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Ask how much the stream may hold, and begin to look after it."""
        info = await self._bus.jetstream.api(f"STREAM.INFO.{self._bus.subjects.stream('REWARDS')}")
        self._limit = max(0, int(info["config"].get("max_bytes", 0)))
        if self._limit:
            self._task = self._bus.tasks.spawn(self._watch(), name="take snapshots", essential=True)

    def start_over(self) -> None:
        """Count from nothing: the stream was lost, and another has begun."""
        self._read_to, self._since, self._round = 0, 0, (0, set())
        self._due.clear()

    async def stop(self) -> None:
        """Publish no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def note(self, message: Stored, reward: Reward | None) -> None:
        """Count a message that has been read, and folded where it is a reward."""
        self._read_to = message.seq
        self._since += len(message.data) + len(message.subject) + OVERHEAD_BYTES
        if reward is not None and reward.snapshot is not None:
            self._note_part(reward.snapshot)
        if self._since > SHARE * self._limit and message.pending < NEAR:  # else a finished round may be yet to come
            self._due.set()

    def _note_part(self, part: Snapshot) -> None:
        through, nodes = self._round
        if part.through != through:
            nodes = set()
        nodes.add(part.profile.key)
        self._round = part.through, nodes
        if len(nodes) >= part.nodes:
            self._since = 0
            self._due.clear()

    async def _watch(self) -> None:
        while True:
            await self._due.wait()
            try:
                if await take_lease(self._bus, LEASE):
                    await self._publish()
            except LoomError as error:
                log.warning("no_snapshots", **error_fields(error))
            await asyncio.sleep(RETRY_S)  # meanwhile the round is read, by this replica and all others

    async def _publish(self) -> None:
        """Publish a round: profiles, and the sequence up to which they hold everything, of one and the same moment."""
        through, profiles = self._read_to, dict(self._profiles)
        round_ = [snapshot_of(profile, through, len(profiles)) for profile in profiles.values()]
        taken = 0
        for one in round_:
            taken += len(encode(one))
            await asyncio.sleep(0)  # a large profile takes milliseconds
        if taken > SHARE * self._limit:
            log.warning("too_much_for_snapshots", bytes=taken, limit=self._limit)
            return
        for one in round_:
            subject = self._bus.subjects.of("reward", ADAPT, one.owner, one.node_id, SNAPSHOTS)
            await store_once(self._bus, subject, one, msg_id=one.reward_id)
        log.info("snapshots_taken", nodes=len(round_), bytes=taken, through=through)


def snapshot_of(profile: NodeProfile, through: int, nodes: int) -> Reward:
    """Return the snapshot of a profile that holds all of its node's rewards up to sequence `through`."""
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
