"""What the stream alone says of every node, beside what is stored; and the repair of what is not the same."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Literal, NamedTuple

from loom.bus.bus import Bus
from loom.bus.natsio.kv import Entry
from loom.bus.natsio.server_errors import Conflict
from loom.bus.queries import between
from loom.bus.stored_rewards import reward_in
from loom.phases.adapt.evidence import apply_reward
from loom.phases.adapt.reward_weights import WEIGHTS
from loom.schemas.identity import qualified, split_qualified
from loom.schemas.learning import SNAPSHOTS, NodeProfile, Reward, Snapshot

Verdict = Literal["same", "behind", "differs", "missing", "beyond"]
"""same: stored as rebuilt. behind: the same, and rewards have come since. differs, missing: stored otherwise, or not
at all. beyond: the stream does not tell, for its head is gone and no round of snapshots stands in for it."""
WRONG: tuple[Verdict, ...] = ("differs", "missing")


class Start(NamedTuple):
    """Where a rebuild begins."""

    seq: int
    """Sequence up to which everything is in the profiles."""
    profiles: dict[str, NodeProfile]
    whole: bool
    """Whether nothing is lost; else the stream's head is gone and nothing stands in for it."""


class Compared(NamedTuple):
    """One node: as stored, and as the stream has it."""

    key: str
    """Under which its profile is stored."""
    verdict: Verdict
    stored: Entry[NodeProfile] | None
    rebuilt: NodeProfile | None
    revision: int = 0
    """Of a stored value that cannot be read, which a repair replaces."""

    @property
    def node(self) -> str:
        """The node as people write it."""
        return qualified(*split_qualified(self.key))


class Rebuilt(NamedTuple):
    """What the stream says."""

    profiles: dict[str, NodeProfile]
    start: Start
    last_seq: int
    then: dict[str, NodeProfile]
    """The same as they were at the sequences asked for."""


async def rebuild(
    bus: Bus, *, forget: bool, weights: Mapping[str, float] = WEIGHTS, at: Mapping[str, int] | None = None
) -> Rebuilt:
    """Fold the stream from its first reward, or from the oldest round of snapshots that stands in for its lost head.

    Args:
        forget: As the phases that wrote the profiles do: whether the award policy forgets what came before a change.
        weights: As theirs: what the judges weigh.
        at: Key of a node -> the last sequence folded of a profile to compare with.

    Raises:
        Refused: There is no such stream.
        BusUnavailable: No answer.
    """
    state = (await bus.jetstream.api(f"STREAM.INFO.{bus.subjects.stream('REWARDS')}"))["state"]
    first, last = state["first_seq"], state["last_seq"]
    start = Start(0, {}, whole=True) if first <= 1 else start_of([one async for one in _snapshots(bus, last)], first)
    profiles, wanted = dict(start.profiles), at or {}
    then = {node: known for node, known in profiles.items() if known.last_seq == wanted.get(node)}
    async for seq, reward in _rewards(bus, "*", start.seq + 1, last):
        key = reward.node_key
        known = profiles.get(key, NodeProfile(node_id=reward.node_id, owner=reward.owner))
        folded = apply_reward(known, reward, seq, forget=forget, weights=weights)
        if folded is known:
            continue
        profiles[key] = folded
        if seq == wanted.get(key):
            then[key] = folded
    return Rebuilt(profiles, start, last, then)


def start_of(snapshots: Sequence[Snapshot], first: int) -> Start:
    """Return the profiles of the oldest finished round behind which the stream still holds everything.

    Args:
        snapshots: In stream order.
        first: Sequence of the first message the stream holds.
    """
    rounds: dict[int, dict[str, NodeProfile]] = {}
    for one in snapshots:
        if one.through + 1 >= first:
            told = rounds.setdefault(one.through, {})
            told[one.profile.key] = one.profile
            if len(told) >= one.nodes:
                return Start(one.through, told, whole=True)
    return Start(first - 1, {}, whole=False)


async def compare(bus: Bus, *, forget: bool, weights: Mapping[str, float] = WEIGHTS) -> tuple[Rebuilt, list[Compared]]:
    """Return what the stream says, and each node beside what is stored of it, by key.

    Raises:
        Refused: There is no such stream.
        BusUnavailable: No answer.
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
    return Compared(key, _verdict(stored, known, rebuilt.then.get(key), rebuilt.start), stored, known)


def _verdict(
    stored: Entry[NodeProfile] | None, rebuilt: NodeProfile | None, then: NodeProfile | None, start: Start
) -> Verdict:
    if stored is not None and then == stored.value:
        return "same" if then == rebuilt else "behind"
    if rebuilt is None or not start.whole:
        return "beyond"
    return "missing" if stored is None else "differs"


async def repair(bus: Bus, wrong: Sequence[Compared]) -> list[str]:
    """Store the rebuilt profiles of what differs or is missing; return the keys that were written meanwhile.

    A node the stream knows nothing of is left as it is.

    Raises:
        BusUnavailable: No answer.
    """
    bucket, lost = bus.bucket("nodes", NodeProfile), []
    for one in wrong:
        if one.verdict not in WRONG or one.rebuilt is None:
            continue
        try:
            await bucket.update(one.key, one.rebuilt, one.stored.revision if one.stored else one.revision)
        except Conflict:
            lost.append(one.key)
    return lost


class StoredProfiles(NamedTuple):
    """What the bucket of profiles holds."""

    profiles: dict[str, Entry[NodeProfile]]
    """By key."""
    unreadable: dict[str, int]
    """Key -> revision of the values that are not a profile of the node in their key."""


async def read_profiles(bus: Bus) -> StoredProfiles:
    """Return every stored profile, and which ones cannot be used."""
    reader = bus.bucket("nodes", NodeProfile).reader()
    found = StoredProfiles({}, {})
    try:
        while not reader.caught_up:
            for entry in await reader.batch():
                if entry.value.key == entry.key:
                    found.profiles[entry.key] = entry
                else:
                    found.unreadable[entry.key] = entry.revision
            found.unreadable.update(reader.unreadable)
    finally:
        await reader.stop()
    return found


async def stored_profiles(bus: Bus) -> dict[str, Entry[NodeProfile]]:
    """Return every stored profile that can be used, by key."""
    return (await read_profiles(bus)).profiles


async def _snapshots(bus: Bus, last: int) -> AsyncIterator[Snapshot]:
    async for _, reward in _rewards(bus, SNAPSHOTS, 1, last):
        if reward.snapshot is not None:
            yield reward.snapshot


async def _rewards(bus: Bus, domain_token: str, first: int, last: int) -> AsyncIterator[tuple[int, Reward]]:
    subject = bus.subjects.of("reward", "*", "*", "*", domain_token)
    async for message in between(bus, bus.subjects.stream("REWARDS"), subject, first, last):
        reward = reward_in(message, bus.subjects, bus.discards)
        if reward is not None:
            yield message.seq, reward
