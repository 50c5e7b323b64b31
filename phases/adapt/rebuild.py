"""Rebuilds every profile from the stream of rewards, compares it with the stored one, and repairs differences."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Literal, NamedTuple

from loom.bus.bus import Bus
from loom.bus.natsio.kv import Entry
from loom.bus.natsio.server_errors import Conflict
from loom.bus.queries import between
from loom.bus.stored_rewards import reward_in
from loom.phases.adapt.evidence import apply_reward
from loom.phases.adapt.profile_store import REBUILD_SCORES, ProfileStore
from loom.phases.adapt.reward_weights import WEIGHTS
from loom.schemas.identity import qualified, split_qualified
from loom.schemas.learning.profile import PROFILE_KEYS, NodeProfile
from loom.schemas.learning.reward import SNAPSHOTS, Reward, Snapshot

Verdict = Literal["same", "behind", "differs", "missing", "beyond"]
"""same: the stored profile equals the rebuilt one. behind: it equals an earlier state of it. differs: it does not.
missing: no profile is stored. beyond: unknown, as the stream has lost its head and no snapshots replace it."""
WRONG: tuple[Verdict, ...] = ("differs", "missing")


class Start(NamedTuple):
    """The state from which a rebuild starts."""

    seq: int
    """Sequence up to which the profiles contain every reward."""
    profiles: ProfileStore
    whole: bool
    """Whether no reward is lost; otherwise the stream has lost its head, and no snapshots replace it."""


class Compared(NamedTuple):
    """The stored profile of a node and the one rebuilt from the stream."""

    key: str
    """Key of the stored profile: `owner.node_id`."""
    verdict: Verdict
    stored: Entry[NodeProfile] | None
    rebuilt: NodeProfile | None
    revision: int = 0
    """Revision of a stored value that cannot be decoded, which a repair replaces; else 0."""

    @property
    def node(self) -> str:
        """The node's qualified name."""
        return qualified(*split_qualified(self.key))


class Rebuilt(NamedTuple):
    """The profiles rebuilt from the stream."""

    profiles: ProfileStore
    start: Start
    last_seq: int
    earlier: ProfileStore
    """The profiles at the sequences in the argument `at`."""


async def rebuild(
    bus: Bus, *, forget: bool, weights: Mapping[str, float] = WEIGHTS, at: Mapping[str, int] | None = None
) -> Rebuilt:
    """Apply the stream from its first reward, or from the oldest round of snapshots that replaces its lost head.

    Args:
        bus: A connected bus.
        forget: Whether the award policy drops scores from before a change, as in the phases that wrote the profiles.
        weights: Weights of the sources, as in those phases.
        at: Key of a node -> `last_seq` of a profile to compare with.

    Raises:
        Refused: The stream does not exist.
        BusUnavailable: The server has not answered.
    """
    state = (await bus.jetstream.api(f"STREAM.INFO.{bus.subjects.stream('REWARDS')}"))["state"]
    first, last = state["first_seq"], state["last_seq"]
    start = Start(0, ProfileStore(REBUILD_SCORES), whole=True) if first <= 1 else await _read_start(bus, first, last)
    profiles, earlier, at = start.profiles.copy(), ProfileStore(REBUILD_SCORES), at or {}
    for key in profiles:
        if profiles.last_seq(key) == at.get(key):
            earlier[key] = profiles[key]
    async for seq, reward in _rewards(bus, "*", start.seq + 1, last):
        key = reward.node_key
        if seq <= (profiles.last_seq(key) or 0):
            continue
        known = profiles.get(key) or NodeProfile(node_id=reward.node_id, owner=reward.owner)
        applied = apply_reward(known, reward, seq, forget=forget, weights=weights)
        if applied is known:
            continue
        profiles[key] = applied
        if seq == at.get(key):
            earlier[key] = applied
    return Rebuilt(profiles, start, last, earlier)


def start_of(snapshots: Sequence[Snapshot], first: int) -> Start:
    """Return the profiles of the oldest complete round after which the stream still holds every message.

    Args:
        snapshots: Snapshots in stream order.
        first: Sequence of the first message in the stream.
    """
    rounds = SnapshotRounds(first)
    found = (start for snapshot in snapshots if (start := rounds.add(snapshot)) is not None)
    return next(found, rounds.nothing)


class SnapshotRounds:
    """Finds the oldest complete round of snapshots after which the stream still holds every message.

    Args:
        first: Sequence of the first message in the stream.
    """

    def __init__(self, first: int) -> None:
        self._first = first
        self._rounds: dict[int, ProfileStore] = {}

    def add(self, snapshot: Snapshot) -> Start | None:
        """Add the next snapshot of the stream; return the start of a rebuild once its round is complete."""
        if snapshot.through + 1 < self._first:
            return None
        profiles = self._rounds.setdefault(snapshot.through, ProfileStore(REBUILD_SCORES))
        profiles[snapshot.profile.key] = snapshot.profile
        return Start(snapshot.through, profiles, whole=True) if len(profiles) >= snapshot.nodes else None

    @property
    def nothing(self) -> Start:
        """The start of a rebuild without a complete round."""
        return Start(self._first - 1, ProfileStore(REBUILD_SCORES), whole=False)


async def compare(bus: Bus, *, forget: bool, weights: Mapping[str, float] = WEIGHTS) -> tuple[Rebuilt, list[Compared]]:
    """Return the rebuilt profiles, and the comparison of each with the stored one, by key.

    Raises:
        Refused: The stream does not exist.
        BusUnavailable: The server has not answered.
    """
    stored, unreadable = await read_profiles(bus)
    at = {node: entry.value.last_seq for node, entry in stored.items()}
    rebuilt = await rebuild(bus, forget=forget, weights=weights, at=at)
    nodes = sorted(stored.keys() | rebuilt.profiles.keys())
    return rebuilt, [
        _compared(node, stored.get(node), rebuilt)._replace(revision=unreadable.get(node, 0)) for node in nodes
    ]


def _compared(key: str, stored: Entry[NodeProfile] | None, rebuilt: Rebuilt) -> Compared:
    known = rebuilt.profiles.get(key)
    return Compared(key, _verdict(stored, known, rebuilt.earlier.get(key), rebuilt.start), stored, known)


def _verdict(
    stored: Entry[NodeProfile] | None, rebuilt: NodeProfile | None, earlier: NodeProfile | None, start: Start
) -> Verdict:
    if stored is not None and earlier == stored.value:
        return "same" if earlier == rebuilt else "behind"
    if rebuilt is None or not start.whole:
        return "beyond"
    return "missing" if stored is None else "differs"


async def repair(bus: Bus, wrong: Sequence[Compared]) -> list[str]:
    """Store the rebuilt profiles of nodes whose profile differs or is missing.

    A node without rewards in the stream is left unchanged.

    Returns:
        The keys that were not repaired, because another process has written them since the comparison.

    Raises:
        BusUnavailable: The server has not answered.
    """
    bucket, conflicts = bus.bucket("nodes", NodeProfile), []
    for node in wrong:
        if node.verdict not in WRONG or node.rebuilt is None:
            continue
        try:
            await bucket.update(node.key, node.rebuilt, node.stored.revision if node.stored else node.revision)
        except Conflict:
            conflicts.append(node.key)
    return conflicts


class StoredProfiles(NamedTuple):
    """The contents of the bucket of profiles."""

    profiles: dict[str, Entry[NodeProfile]]
    """Key -> profile."""
    unreadable: dict[str, int]
    """Key -> revision of each value that is not a profile of the node in its key."""


async def read_profiles(bus: Bus) -> StoredProfiles:
    """Return every stored profile, and the revisions of the values that are not usable."""
    reader = bus.bucket("nodes", NodeProfile).reader(PROFILE_KEYS)
    contents = StoredProfiles({}, {})
    try:
        while not reader.caught_up:
            for entry in await reader.batch():
                if entry.value.key == entry.key:
                    contents.profiles[entry.key] = entry
                else:
                    contents.unreadable[entry.key] = entry.revision
            contents.unreadable.update(reader.unreadable)
    finally:
        await reader.stop()
    return contents


async def stored_profiles(bus: Bus) -> dict[str, Entry[NodeProfile]]:
    """Return every usable stored profile, by key."""
    return (await read_profiles(bus)).profiles


async def _read_start(bus: Bus, first: int, last: int) -> Start:
    """Return the start of a rebuild from the snapshots in the stream; reads only as far as necessary."""
    rounds = SnapshotRounds(first)
    async with aclosing(_rewards(bus, SNAPSHOTS, 1, last)) as rewards:
        async for _, reward in rewards:
            if reward.snapshot is not None and (start := rounds.add(reward.snapshot)) is not None:
                return start
    return rounds.nothing


async def _rewards(bus: Bus, domain_token: str, first: int, last: int) -> AsyncGenerator[tuple[int, Reward], None]:
    subject = bus.subjects.of("reward", "*", "*", "*", domain_token)
    async with aclosing(between(bus, bus.subjects.stream("REWARDS"), subject, first, last)) as messages:
        async for message in messages:
            reward = reward_in(message, bus.subjects, bus.discards)
            if reward is not None:
                yield message.seq, reward
