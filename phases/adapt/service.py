"""Adapt: turn rewards into what is known of each node, and retire those the cluster is better without.

Consumes   the RewardBus (stream REWARDS), whole, in stream order; host announcements
Publishes  lifecycle.learned.<node>   a profile has changed
           lifecycle.changed.<node>   the node itself has: what came before is forgotten
           retire.<host>              a request to let an idle or failing child go; what it has learned is inherited
State      NodeProfiles, one compare-and-set per node and batch; replicas that are overtaken stand by
Gives up   an undecodable reward is logged and left out: nobody waits for it
"""

import asyncio
import time

import structlog

from loom.bus.client import Bus, Conflict
from loom.bus.faults import describe
from loom.bus.kv import Bucket
from loom.bus.ordered import OrderedReader, Stored
from loom.phases.adapt.fold import change_in, fold, summary
from loom.phases.adapt.retiring import Retiring
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import LoomError
from loom.schemas.learning import Lifecycle, NodeProfile, Reward
from loom.schemas.wire import Undecodable, decode

log = structlog.get_logger()

BATCH_S = 0.02
STANDBY_S = 1.0  # a standby writes what the active replica has not written by then
FORGETTING = "glr_ucb"  # the award policy that forgets what came before a change
TOLD_TASKS = 256  # task ids one `learned` names


class Adapt:
    """The sixth phase."""

    def __init__(self, bus: Bus, config: ClusterConfig) -> None:
        self._bus = bus
        self._forget = config.policy == FORGETTING
        self._profiles: dict[str, NodeProfile] = {}
        self._revisions: dict[str, int] = {}
        self._learned: dict[str, list[str]] = {}
        """node id -> tasks folded and not yet written; none for what is no task's reward."""
        self._changed: dict[str, list[str]] = {}
        """node id -> changes found and not yet told."""
        self._standby_until = 0.0
        self._retiring = Retiring(bus, config, self._profiles)
        self._bucket = Bucket(bus, "nodes", NodeProfile)
        self._reader = OrderedReader(bus, bus.subjects.stream("REWARDS"), filter=bus.subjects.of("reward", "*", "*"))
        self._dirty = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Read what is known, then the whole stream; what is known already is skipped."""
        profiles = self._bucket.reader()
        while not profiles.caught_up:
            for entry in await profiles.batch():
                self._profiles[entry.key], self._revisions[entry.key] = entry.value, entry.revision
        await profiles.stop()
        await self._reader.start()
        self._tasks = [
            self._bus.spawn(self._read(), name="fold rewards"),
            self._bus.spawn(self._write(), name="write profiles"),
        ]
        await self._retiring.start()

    async def drain(self, timeout_s: float) -> None:
        """Stop reading; the stream keeps what is not folded yet."""
        await self._retiring.stop()
        await self._reader.stop()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(timeout_s):
                await self._flush()
        except (LoomError, TimeoutError) as error:
            log.info("profiles_left_to_others", **describe(error))

    async def _read(self) -> None:
        while True:
            for message in await self._reader.batch():
                self._fold(message)

    def _fold(self, message: Stored) -> None:
        try:
            reward = decode(message.data, Reward)
        except Undecodable as error:
            log.warning("reward_undecodable", subject=message.subject, reason=error.message)
            return
        if message.subject != self._bus.subjects.of("reward", reward.node_id, reward.slug):
            log.warning("reward_misaddressed", subject=message.subject, node_id=reward.node_id)
            return
        known = self._profiles.get(reward.node_id, NodeProfile(node_id=reward.node_id))
        folded = fold(known, reward, message.seq, forget=self._forget)
        if folded is not known:
            if (change := change_in(known, folded)) is not None:
                self._changed.setdefault(reward.node_id, []).append(change)
            self._profiles[reward.node_id] = folded
            learned = self._learned.setdefault(reward.node_id, [])
            if reward.kind != "inherit":
                learned.append(reward.task_id)
            self._dirty.set()

    async def _write(self) -> None:
        while True:
            await self._dirty.wait()
            standby_s = self._standby_until - time.monotonic()
            await asyncio.sleep(max(BATCH_S, standby_s))  # what arrives meanwhile shares the write
            self._dirty.clear()
            try:
                await self._flush()
            except LoomError as error:
                log.warning("profiles_not_written", reason=error.message)
                self._dirty.set()
                await asyncio.sleep(STANDBY_S)

    async def _flush(self) -> None:
        for node_id in list(self._learned):
            await self._put(node_id)

    async def _put(self, node_id: str) -> None:
        """Write one profile, unless another replica has written at least as much.

        Rewards are folded on while the server answers; what the write does not hold stays to be written.
        """
        while True:
            profile, tasks = self._profiles[node_id], list(self._learned[node_id])
            try:
                revision = await self._bucket.update(node_id, profile, self._revisions.get(node_id, 0))
            except Conflict:
                entry = await self._bucket.get(node_id)
                self._revisions[node_id] = entry.revision if entry else 0
                if entry is None or entry.value.last_seq < profile.last_seq:
                    continue  # ours holds more of the same stream
                if entry.value.last_seq > self._profiles[node_id].last_seq:
                    self._profiles[node_id] = entry.value
                self._settle(node_id, len(tasks), entry.value)
                self._changed.pop(node_id, None)
                self._standby_until = time.monotonic() + STANDBY_S
                return
            self._revisions[node_id] = revision
            self._settle(node_id, len(tasks), profile)
            await self._tell(profile, tasks)
            for change in self._changed.pop(node_id, ()):
                await self._say_changed(node_id, change)
            return

    def _settle(self, node_id: str, tasks: int, written: NodeProfile) -> None:
        """Forget the first so many tasks of a node: their rewards are in the written profile."""
        del self._learned[node_id][:tasks]
        if not self._learned[node_id] and self._profiles[node_id].last_seq <= written.last_seq:
            del self._learned[node_id]

    async def _say_changed(self, node_id: str, change: str) -> None:
        log.info("node_changed", node_id=node_id, change=change)
        news = Lifecycle(kind="changed", node_id=node_id, at=self._bus.now(), reason=change)
        await self._bus.publish(self._bus.subjects.of("lifecycle", "changed", node_id), news)

    async def _tell(self, profile: NodeProfile, task_ids: list[str]) -> None:
        log.debug("learned", node_id=profile.node_id, tasks=len(task_ids), last_seq=profile.last_seq)
        for start in range(0, max(1, len(task_ids)), TOLD_TASKS):
            news = Lifecycle(
                kind="learned",
                node_id=profile.node_id,
                at=self._bus.now(),
                task_ids=tuple(task_ids[start : start + TOLD_TASKS]),
                profile=summary(profile),
            )
            await self._bus.publish(self._bus.subjects.of("lifecycle", "learned", profile.node_id), news)
