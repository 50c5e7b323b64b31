"""The profiles of all nodes: changed by rewards, and written to the bucket `nodes` by compare-and-set."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.kv import Entry
from loom.bus.natsio.server_errors import Conflict
from loom.bus.stored_rewards import SKEW_S
from loom.bus.topology import stream_state
from loom.phases.adapt.concurrency import for_each
from loom.phases.adapt.evidence import apply_reward, change_between, newest_time, summary
from loom.phases.adapt.profile_store import ProfileStore
from loom.phases.adapt.rebuild import rebuild
from loom.phases.adapt.summary_writer import SummaryWriter
from loom.schemas.base import Undecodable, decode
from loom.schemas.errors import LoomError
from loom.schemas.identity import ADAPT, split_qualified
from loom.schemas.learning.lifecycle import Lifecycle
from loom.schemas.learning.profile import PROFILE_KEYS, NodeProfile
from loom.schemas.learning.reward import Reward
from loom.schemas.learning.summary import ProfileSummary

log = get_logger()

LEARNED_TASKS = 256  # task ids in one `learned` event


class ProfileWriter:
    """Applies rewards to the profiles, writes changed ones with their summaries, and publishes an event for each write.

    Every replica applies the same stream. A replica whose write conflicts with another replica's stands by.

    Args:
        bus: A connected bus.
        forget: Whether scores from before a change of a node are dropped.
        weights: Weights of reward sources.
        on_change: Called when a profile has to be written.
        standby_s: Seconds after which a standby writes what the active replica has not written.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        forget: bool,
        weights: Mapping[str, float],
        on_change: Callable[[], None],
        standby_s: float,
    ) -> None:
        self._bus = bus
        self._forget = forget
        self._weights = weights
        self._on_change = on_change
        self._standby_s = standby_s
        self._bucket = bus.bucket("nodes", NodeProfile)
        self._profiles = ProfileStore()
        self._summaries = SummaryWriter(bus, self._profiles)
        self._revisions: dict[str, int] = {}
        self._unwritten: dict[str, list[tuple[int, Reward]]] = {}
        """Key -> applied rewards that are not written, with their sequences; empty: the whole profile is rebuilt."""
        self._changes: dict[str, list[str]] = {}
        """Key -> changes of the node that are not published."""
        self._standby_until = 0.0
        self._flushed_at = time.monotonic()
        """When the last flush ended, or the first reward after it was applied."""
        self.read_seq = 0
        """Sequence of the last message that was read from the stream."""

    @property
    def profiles(self) -> ProfileStore:
        """The live profiles, by the key in the bucket: `owner.node_id`; they are changed only here."""
        return self._profiles

    @property
    def unwritten(self) -> int:
        """Number of profiles that have to be written."""
        return len(self._unwritten)

    @property
    def unwritten_s(self) -> float:
        """Seconds for which profiles have waited to be written; 0 if none waits."""
        return time.monotonic() - self._flushed_at if self._unwritten else 0.0

    @property
    def standby_s(self) -> float:
        """Seconds for which this replica leaves writes to another one; at most 0: none."""
        return self._standby_until - time.monotonic()

    # -- load

    async def load(self) -> int:
        """Load the stored profiles, and rebuild those that the stream does not confirm.

        Returns:
            The last sequence of the stream.
        """
        await self._summaries.load()
        newest, unreadable = await self._read_all()
        state = await stream_state(self._bus, "REWARDS")  # after the profiles, so that none rests on a later reward
        last_seq = int(state["last_seq"])
        beyond = [key for key in self._profiles if (self._profiles.last_seq(key) or 0) > last_seq]
        if beyond:
            log.warning("profiles_beyond_stream", nodes=sorted(beyond), last_seq=last_seq)
        ahead = _dated_ahead(newest, state)
        if ahead:
            log.warning("profiles_dated_ahead", nodes=ahead)
            for key in ahead:
                owner, node_id = split_qualified(key)
                self._profiles[key] = NodeProfile(node_id=node_id, owner=owner)
        if beyond or ahead or unreadable or not self._profiles:
            await self._rebuild([*beyond, *ahead])
        return last_seq

    async def _read_all(self) -> tuple[dict[str, float], bool]:
        """Read the stored profiles; return the newest time in each, by key, and whether a value is not usable."""
        reader, newest, unreadable = self._bucket.reader(PROFILE_KEYS), dict[str, float](), False
        try:
            while not reader.caught_up:
                for entry in await reader.batch():
                    self._revisions[entry.key] = entry.revision
                    if entry.key != entry.value.key:
                        unreadable = True
                        continue
                    self._profiles[entry.key] = entry.value
                    newest[entry.key] = newest_time(entry.value)
                    if self._summaries.is_stale(entry.key, entry.value):
                        self._mark_summary(entry.key, after_s=0)
                self._revisions |= reader.unreadable
                unreadable = unreadable or bool(reader.unreadable)
        finally:
            await reader.stop()
        return newest, unreadable

    async def _rebuild(self, keys: Sequence[str]) -> None:
        """Rebuild these profiles and unknown ones from the stream; snapshots may replace its lost head."""
        rebuilt = (await rebuild(self._bus, forget=self._forget, weights=self._weights)).profiles
        for key in {*keys, *(rebuilt.keys() - self._profiles.keys())}:
            # A stream without rewards of the node was lost: the stored profile is all that is left.
            profile = rebuilt.pop(key)  # two copies of all profiles would need too much memory
            self._profiles[key] = replace(self._profiles[key], last_seq=0) if profile is None else profile
            self._unwritten[key] = []
            self._on_change()

    def on_stream_reset(self) -> None:
        """Keep every profile, and accept rewards of the new stream from its first sequence on."""
        for key in list(self._profiles):
            self._profiles[key] = replace(self._profiles[key], last_seq=0)
            self._unwritten[key] = []
        self._on_change()

    # -- apply and write

    def apply(self, seq: int, reward: Reward) -> None:
        """Apply the reward at stream sequence `seq` to its node's profile."""
        key = reward.node_key
        if seq <= (self._profiles.last_seq(key) or 0):
            return
        before = self._profiles.get(key) or NodeProfile(node_id=reward.node_id, owner=reward.owner)
        after = apply_reward(before, reward, seq, forget=self._forget, weights=self._weights)
        if after is before:
            return
        if (change := change_between(before, after)) is not None:
            self._changes.setdefault(key, []).append(change)
        self._profiles[key] = after
        if not self._unwritten:
            self._flushed_at = time.monotonic()
        self._unwritten.setdefault(key, []).append((seq, reward))
        self._on_change()

    async def flush(self) -> None:
        """Write the changed profiles and their summaries.

        Raises:
            BusUnavailable: The server has not answered.
        """
        await for_each(list(self._unwritten), self._write)
        await self._summaries.write_stale(time.monotonic(), self._unwritten)
        self._flushed_at = time.monotonic()

    async def _write(self, key: str) -> None:
        """Write one profile, unless another replica has written at least as much.

        Rewards are applied while the server answers. Those that the write does not contain stay unwritten.
        """
        while True:
            profile = self._profiles[key]
            rewards = [reward for _, reward in self._unwritten[key]]
            try:
                revision = await self._bucket.update(key, profile, self._revisions.get(key, 0))
            except Conflict:
                stored = await self._read_stored(key)
                if stored is None or await self._is_beyond_stream(key, stored) or self._adopt(stored):
                    continue
                self._changes.pop(key, None)
                self._standby_until = time.monotonic() + self._standby_s
                self._mark_summary(key)
                return
            self._revisions[key] = revision
            self._drop_written(profile)
            await self._summaries.write(profile, rewards)
            await self._publish_learned(profile, [reward.task_id for reward in rewards if reward.kind != "inherit"])
            for change in self._changes.pop(key, ()):
                await self._publish_changed(profile, change)
            return

    async def _read_stored(self, key: str) -> NodeProfile | None:
        """Return the stored profile of a node and keep its revision; None without a usable one."""
        try:
            entry = await self._bucket.get(key)
        except Undecodable as error:
            self._revisions[key] = await self._bucket.revision(key)
            log.warning("profile_replaced", node=key, reason=error.message)
            return None
        self._revisions[key] = entry.revision if entry else 0
        return entry.value if entry is not None and entry.value.key == key else None

    async def _is_beyond_stream(self, key: str, stored: NodeProfile) -> bool:
        """Return whether a stored profile rests on sequences that the stream does not have, and so is invalid."""
        if stored.last_seq <= (self._profiles.last_seq(key) or 0):
            return False
        return stored.last_seq > int((await stream_state(self._bus, "REWARDS"))["last_seq"])

    def _adopt(self, stored: NodeProfile) -> bool:
        """Replace a profile by the stored one, with the missing rewards applied.

        Another replica has applied the same stream, so this changes nothing, unless an operator has repaired the
        profile.

        Returns:
            Whether the result has to be written.
        """
        key = stored.key
        missing = [(seq, reward) for seq, reward in self._unwritten[key] if seq > stored.last_seq]
        if not missing and stored.last_seq < self._profiles[key].last_seq:
            return True  # a rebuilt profile is complete, and is not kept as single rewards
        self._drop_written(stored)
        for seq, reward in missing:
            stored = apply_reward(stored, reward, seq, forget=self._forget, weights=self._weights)
        self._profiles[key] = stored
        return bool(missing)

    def _drop_written(self, written: NodeProfile) -> None:
        """Drop the unwritten rewards that a written profile contains."""
        key = written.key
        rest = [(seq, reward) for seq, reward in self._unwritten[key] if seq > written.last_seq]
        if rest:
            self._unwritten[key] = rest
        else:
            del self._unwritten[key]

    # -- follow the bucket

    async def follow(self) -> None:
        """Adopt profiles that an operator has repaired: they rest on the same rewards as those of this replica.

        Most values are those that this replica has written, so that a value is decoded only when it is another one.
        """
        reader = self._bus.bucket("nodes", msgspec.Raw).reader(PROFILE_KEYS)
        await reader.start()
        generation = 0
        try:
            while True:
                batch = await reader.batch()
                if reader.generation != generation:
                    generation = reader.generation
                    await self._mark_all()
                for entry in batch:
                    await self._on_entry(entry)
                for key in reader.unreadable:
                    self._mark(key)
        finally:
            await reader.stop()

    async def follow_summaries(self) -> None:
        """Write summaries again that another process has changed so that they do not agree with their profiles."""
        await self._summaries.follow(self._on_summary)

    async def _on_summary(self, key: str, summary: ProfileSummary | None) -> None:
        """Mark a summary of another process for a check, unless it rests on rewards that were not read here yet."""
        if key not in self._profiles or key in self._unwritten:
            return
        if summary is None or summary.last_seq <= self.read_seq or await self._exceeds_stream(key, summary.last_seq):
            self._mark_summary(key)

    async def _on_entry(self, entry: Entry[msgspec.Raw]) -> None:
        own_seq = self._profiles.last_seq(entry.key)
        if own_seq is None or entry.key in self._unwritten or self._revisions.get(entry.key) == entry.revision:
            return
        try:
            stored = decode(bytes(entry.value), NodeProfile)
        except Undecodable as error:
            self._bus.discards.add("value_undecodable", reason=error.message, subject=entry.key)
            self._mark(entry.key)
            return
        if stored.key != entry.key:
            self._mark(entry.key)
        elif own_seq == stored.last_seq:
            self._profiles[entry.key], self._revisions[entry.key] = stored, entry.revision
            self._mark_summary(entry.key)
        elif stored.last_seq > max(own_seq, self.read_seq) and await self._exceeds_stream(entry.key, stored.last_seq):
            self._mark(entry.key)

    def _mark_summary(self, key: str, after_s: float | None = None) -> None:
        """Mark a summary for a check after `after_s` seconds; by default, another replica has time to write it."""
        after_s = self._standby_s if after_s is None else after_s
        self._summaries.check_later(key, time.monotonic() + after_s)
        asyncio.get_running_loop().call_later(after_s, self._on_change)

    async def _exceeds_stream(self, key: str, last_seq: int) -> bool:
        """Return whether the stream has no such sequence; False as well if the server does not answer."""
        try:
            return last_seq > int((await stream_state(self._bus, "REWARDS"))["last_seq"])
        except LoomError as error:  # the next reward of the node repeats the check
            log.warning("profile_not_checked", node=key, reason=error.message)
            return False

    def _mark(self, key: str) -> None:
        """Mark a profile for writing, to replace an invalid stored one."""
        if key in self._profiles:
            log.warning("profile_replaced", node=key)
            self._unwritten.setdefault(key, [])
            self._on_change()

    async def _mark_all(self) -> None:
        """Mark every profile of the present stream for writing, because the bucket with its values was lost."""
        try:
            last_seq = (await stream_state(self._bus, "REWARDS"))["last_seq"]
        except LoomError as error:  # a profile is written again with its next reward
            log.warning("profiles_not_written", reason=error.message)
            return
        for key in self._profiles:
            if (self._profiles.last_seq(key) or 0) <= last_seq:
                self._unwritten.setdefault(key, [])
        self._on_change()

    # -- lifecycle events

    async def _publish_changed(self, profile: NodeProfile, change: str) -> None:
        log.info("node_changed", node=profile.name, change=change)
        event = Lifecycle(
            kind="changed", node_id=profile.node_id, owner=profile.owner, at=self._bus.clock.now(), reason=change
        )
        await self._publish(event)

    async def _publish_learned(self, profile: NodeProfile, task_ids: list[str]) -> None:
        log.debug("learned", node=profile.name, tasks=len(task_ids), last_seq=profile.last_seq)
        for start in range(0, max(1, len(task_ids)), LEARNED_TASKS):
            event = Lifecycle(
                kind="learned",
                node_id=profile.node_id,
                owner=profile.owner,
                at=self._bus.clock.now(),
                task_ids=tuple(task_ids[start : start + LEARNED_TASKS]),
                profile=summary(profile),
            )
            await self._publish(event)

    async def _publish(self, event: Lifecycle) -> None:
        subject = self._bus.subjects.of("lifecycle", ADAPT, event.kind, event.owner, event.node_id)
        await self._bus.connection.publish(subject, event)


def _dated_ahead(newest: Mapping[str, float], state: dict[str, Any]) -> list[str]:
    """Return the keys of profiles with attempts that ended after the stream's last reward was stored."""
    if not state["messages"]:
        return []
    stored_at = datetime.fromisoformat(state["last_ts"]).timestamp()
    return sorted(key for key, at in newest.items() if at > stored_at + SKEW_S)
