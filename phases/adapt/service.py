"""Adapt: turn rewards into what is known of each node, and retire those the cluster is better without.

Consumes   the RewardBus (stream REWARDS), whole, in stream order; host announcements
Publishes  lifecycle.adapt.learned.<owner>.<node>   a profile has changed
           lifecycle.adapt.changed.<owner>.<node>   the node itself has changed: what came before is forgotten
           retire.<owner>.<host>                    an idle or failing child is to go; what it has learned is inherited
           reward.adapt.<owner>.<node>._snapshot    what is known of each node, before the stream drops the rewards it
                                                    rests on
State      NodeProfiles, one compare-and-set per node and batch; replicas that are overtaken stand by.
           How far SENSE is off in each domain, the same way
Gives up   an undecodable reward is logged and left out: nobody waits for it
"""

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.hops.health import Health
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.log_fields import summary as summary_of
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.ordered_consumer import OrderedConsumer, Stored
from loom.bus.natsio.server_errors import Conflict
from loom.bus.stored_rewards import reward_in
from loom.bus.topology import stream_state
from loom.phases.adapt.calibration_writer import Calibrating
from loom.phases.adapt.evidence import apply_reward, change_in, forgets, is_dated_ahead, summary
from loom.phases.adapt.rebuild import read_profiles, rebuild
from loom.phases.adapt.retirement import Retiring
from loom.phases.adapt.reward_weights import weights_of
from loom.phases.adapt.snapshots import Snapshots
from loom.schemas.base import Undecodable, total_s
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import LoomError
from loom.schemas.identity import ADAPT, split_qualified
from loom.schemas.learning import Lifecycle, NodeProfile, Reward

log = get_logger()

BATCH_S = 0.02
STANDBY_S = 1.0  # a standby writes what the active replica has not written by then
TOLD_TASKS = 256  # task ids one `learned` names


class Adapt:
    """The sixth phase."""

    def __init__(self, bus: Bus, config: ClusterConfig) -> None:
        self._bus = bus
        self._forget = forgets(config.policy)
        self._weights = weights_of(config.judge_weights)
        self._profiles: dict[str, NodeProfile] = {}
        """By key, as in the bucket: `owner.node_id`."""
        self._revisions: dict[str, int] = {}
        self._unwritten: dict[str, list[tuple[int, Reward]]] = {}
        """Key -> rewards folded and not yet written, with their sequences; none: written whole, by a rebuild."""
        self._changed: dict[str, list[str]] = {}
        """Key -> changes found and not published yet."""
        self._standby_until = 0.0
        self._read_seq = 0
        self._unwritten_since = time.monotonic()
        """When a flush last left nothing unwritten."""
        self._retiring = Retiring(bus, config, self._profiles)
        self._snapshots = Snapshots(bus, self._profiles)
        self._calibrating = Calibrating(bus)
        self._bucket = bus.bucket("nodes", NodeProfile)
        self._reader = OrderedConsumer(
            bus.jetstream, bus.subjects.stream("REWARDS"), filter=bus.subjects.of("reward", "*", "*", "*", "*")
        )
        self._dirty = asyncio.Event()
        self._writing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    def health(self) -> Health:
        """Return how far the stream has been read, and how long a profile has waited to be written."""
        waiting_s = time.monotonic() - self._unwritten_since if self._unwritten else 0.0
        return Health(in_hand=len(self._unwritten), oldest_s=total_s(waiting_s), last_seq=self._read_seq)

    async def start(self) -> None:
        """Read what is known, then the whole stream; what is known already is skipped."""
        await self._load()
        await self._snapshots.start()
        await self._reader.start()
        self._tasks = [
            self._bus.tasks.spawn(self._read(), name="fold rewards", essential=True),
            self._bus.tasks.spawn(self._write(), name="write profiles", essential=True),
            self._bus.tasks.spawn(self._follow(), name="follow profiles", essential=True),
        ]
        await self._retiring.start()

    async def _load(self) -> None:
        """Read what is stored; what the stream cannot have given is taken from the stream instead."""
        stored, unreadable = await read_profiles(self._bus)
        state = await stream_state(self._bus, "REWARDS")  # after the profiles: none can rest on more
        for key, entry in stored.items():
            self._profiles[key], self._revisions[key] = entry.value, entry.revision
        self._revisions |= unreadable
        beyond = [key for key, profile in self._profiles.items() if profile.last_seq > state["last_seq"]]
        if beyond:
            log.warning("profiles_beyond_stream", nodes=sorted(beyond), last_seq=state["last_seq"])
        ahead = self._dated_ahead(state)
        if ahead:
            log.warning("profiles_dated_ahead", nodes=ahead)
            for key in ahead:
                self._profiles[key] = _unknown(key)
        if beyond or ahead or unreadable or not self._profiles:
            await self._rebuild([*beyond, *ahead])
        await self._calibrating.start(state["last_seq"])

    def _dated_ahead(self, state: dict[str, Any]) -> list[str]:
        """Return the keys of the profiles that hold attempts that ended after the stream's last reward was stored."""
        if not state["messages"]:
            return []
        stored_at = datetime.fromisoformat(state["last_ts"]).timestamp()
        return sorted(key for key, profile in self._profiles.items() if is_dated_ahead(profile, stored_at))

    async def _rebuild(self, keys: Sequence[str]) -> None:
        """Fold the stream for these nodes and unknown ones; snapshots may stand in for its lost head."""
        rebuilt = (await rebuild(self._bus, forget=self._forget, weights=self._weights)).profiles
        for key in {*keys, *(rebuilt.keys() - self._profiles.keys())}:
            # A stream that knows nothing of the node was lost, and what is stored is all there is.
            known = rebuilt.get(key) or replace(self._profiles[key], last_seq=0)
            self._profiles[key] = known
            self._unwritten[key] = []
            self._dirty.set()

    async def _start_over(self) -> None:
        """Keep what is known: the stream it rests on was lost, and another has begun at its first sequence."""
        async with self._writing:
            for key, profile in self._profiles.items():
                self._profiles[key] = replace(profile, last_seq=0)
                self._unwritten[key] = []
            self._calibrating.start_over()
            self._snapshots.start_over()
        self._dirty.set()

    async def drain(self, timeout_s: float) -> None:
        """Stop reading; the stream keeps what is not folded yet."""
        await self._retiring.stop()
        await self._snapshots.stop()
        await self._reader.stop()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(timeout_s):
                await self._flush()
        except (LoomError, TimeoutError) as error:
            log.info("profiles_left_to_others", **error_fields(error))

    async def _read(self) -> None:
        generation = self._reader.generation
        while True:
            batch = await self._reader.batch()
            if self._reader.generation != generation:
                generation = self._reader.generation
                await self._start_over()
            for message in batch:
                self._take(message)

    def _take(self, message: Stored) -> None:
        self._read_seq = message.seq
        reward = reward_in(message, self._bus.subjects, self._bus.discards)
        try:
            if reward is not None:
                self._fold(message.seq, reward)
        except Exception as error:  # noqa: BLE001 - no reward, whatever it holds, may end the learning from all others
            self._bus.discards.add("reward_not_folded", reason=summary_of(error), subject=message.subject)
        self._snapshots.note(message, reward)

    def _fold(self, seq: int, reward: Reward) -> None:
        if self._calibrating.fold(seq, reward):
            self._dirty.set()
        key = reward.node_key
        known = self._profiles.get(key, NodeProfile(node_id=reward.node_id, owner=reward.owner))
        folded = apply_reward(known, reward, seq, forget=self._forget, weights=self._weights)
        if folded is known:
            return
        if (change := change_in(known, folded)) is not None:
            self._changed.setdefault(key, []).append(change)
        self._profiles[key] = folded
        if not self._unwritten:
            self._unwritten_since = time.monotonic()
        self._unwritten.setdefault(key, []).append((seq, reward))
        self._dirty.set()

    async def _follow(self) -> None:
        """Take over what an operator has repaired: it rests on the same rewards as what is known here."""
        reader = self._bucket.reader()
        await reader.start()
        generation = 0
        try:
            while True:
                batch = await reader.batch()
                if reader.generation != generation:
                    generation = reader.generation
                    await self._write_all()
                for entry in batch:
                    mine = self._profiles.get(entry.key)
                    if mine is None or entry.key in self._unwritten:
                        continue
                    if entry.value.key != entry.key:
                        self._replace(entry.key)
                    elif mine.last_seq == entry.value.last_seq:
                        self._profiles[entry.key], self._revisions[entry.key] = entry.value, entry.revision
                    elif entry.value.last_seq > self._read_seq:
                        await self._replace_if_beyond(entry.key, entry.value)
                for key in reader.unreadable:
                    self._replace(key)
        finally:
            await reader.stop()

    async def _replace_if_beyond(self, key: str, stored: NodeProfile) -> None:
        try:
            if await self._is_beyond_stream(key, stored):
                self._replace(key)
        except LoomError as error:  # the next reward of the node brings it up again
            log.warning("profile_not_checked", node=key, reason=error.message)

    def _replace(self, key: str) -> None:
        """Have a stored profile that cannot be believed written over, if there is something to write."""
        if key in self._profiles:
            log.warning("profile_replaced", node=key)
            self._unwritten.setdefault(key, [])
            self._dirty.set()

    async def _write_all(self) -> None:
        """Have every profile of the present stream written again: the bucket was lost with what stood in it."""
        try:
            last_seq = (await stream_state(self._bus, "REWARDS"))["last_seq"]
        except LoomError as error:  # a profile is written again with its next reward
            log.warning("profiles_not_written", reason=error.message)
            return
        for key, profile in self._profiles.items():
            if profile.last_seq <= last_seq:
                self._unwritten.setdefault(key, [])
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
        async with self._writing:
            for key in list(self._unwritten):
                await self._put(key)
            await self._calibrating.flush()
        self._unwritten_since = time.monotonic()

    async def _put(self, key: str) -> None:
        """Write one profile, unless another replica has written at least as much.

        Rewards are folded on while the server answers; what the write does not hold stays to be written.
        """
        while True:
            profile = self._profiles[key]
            tasks = [reward.task_id for _, reward in self._unwritten[key] if reward.kind != "inherit"]
            try:
                revision = await self._bucket.update(key, profile, self._revisions.get(key, 0))
            except Conflict:
                stored = await self._stored(key)
                if stored is None or await self._is_beyond_stream(key, stored) or self._adopt(stored):
                    continue
                self._changed.pop(key, None)
                self._standby_until = time.monotonic() + STANDBY_S
                return
            self._revisions[key] = revision
            self._settle(profile)
            await self._tell(profile, tasks)
            for change in self._changed.pop(key, ()):
                await self._say_changed(profile, change)
            return

    async def _stored(self, key: str) -> NodeProfile | None:
        """Return the stored profile of a node and note its revision; None where there is none that can be used."""
        try:
            entry = await self._bucket.get(key)
        except Undecodable as error:
            self._revisions[key] = await self._bucket.revision(key)
            log.warning("profile_replaced", node=key, reason=error.message)
            return None
        self._revisions[key] = entry.revision if entry else 0
        return entry.value if entry is not None and entry.value.key == key else None

    async def _is_beyond_stream(self, key: str, stored: NodeProfile) -> bool:
        """Whether a stored profile claims rewards that the stream does not hold: nothing of it can be believed."""
        if stored.last_seq <= self._profiles[key].last_seq:
            return False
        return stored.last_seq > int((await stream_state(self._bus, "REWARDS"))["last_seq"])

    def _adopt(self, stored: NodeProfile) -> bool:
        """Take another's profile, with what it lacks folded onto it; return whether there is any of that to write.

        Another replica has folded the same stream, so nothing changes by it; an operator may have repaired it.
        """
        key = stored.key
        lacking = [one for one in self._unwritten[key] if one[0] > stored.last_seq]
        if not lacking and stored.last_seq < self._profiles[key].last_seq:
            return True  # ours comes from a rebuild: it is whole, and not in pieces to fold
        self._settle(stored)
        for seq, reward in lacking:
            stored = apply_reward(stored, reward, seq, forget=self._forget, weights=self._weights)
        self._profiles[key] = stored
        return bool(lacking)

    def _settle(self, written: NodeProfile) -> None:
        """Forget the rewards that are in a written profile."""
        key = written.key
        left = [one for one in self._unwritten[key] if one[0] > written.last_seq]
        if left:
            self._unwritten[key] = left
        else:
            del self._unwritten[key]

    async def _say_changed(self, profile: NodeProfile, change: str) -> None:
        log.info("node_changed", node=profile.name, change=change)
        news = Lifecycle(
            kind="changed", node_id=profile.node_id, owner=profile.owner, at=self._bus.clock.now(), reason=change
        )
        await self._publish(news)

    async def _publish(self, news: Lifecycle) -> None:
        await self._bus.connection.publish(
            self._bus.subjects.of("lifecycle", ADAPT, news.kind, news.owner, news.node_id), news
        )

    async def _tell(self, profile: NodeProfile, task_ids: list[str]) -> None:
        log.debug("learned", node=profile.name, tasks=len(task_ids), last_seq=profile.last_seq)
        for start in range(0, max(1, len(task_ids)), TOLD_TASKS):
            news = Lifecycle(
                kind="learned",
                node_id=profile.node_id,
                owner=profile.owner,
                at=self._bus.clock.now(),
                task_ids=tuple(task_ids[start : start + TOLD_TASKS]),
                profile=summary(profile),
            )
            await self._publish(news)


def _unknown(key: str) -> NodeProfile:
    owner, node_id = split_qualified(key)
    return NodeProfile(node_id=node_id, owner=owner)
