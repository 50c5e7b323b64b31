"""Writes the summary of each profile, which is all that MATCH reads of a node."""

from collections.abc import Awaitable, Callable, Container, Iterable, Mapping

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.natsio.server_errors import Conflict
from loom.phases.adapt.concurrency import for_each
from loom.phases.adapt.evidence import losses_in
from loom.phases.adapt.reward_weights import attempt_id
from loom.schemas.base import Undecodable
from loom.schemas.learning.profile import WINDOW, DomainEvidence, NodeProfile
from loom.schemas.learning.reward import Reward
from loom.schemas.learning.summary import SUMMARY_KEYS, DomainSummary, ProfileSummary, summary_key

KEPT_ATTEMPTS = 8
"""Attempts of earlier writes that a summary still names: a reader may miss a value that the next one has replaced."""


def summary_of(
    profile: NodeProfile, before: ProfileSummary | None = None, rewards: Iterable[Reward] = ()
) -> ProfileSummary:
    """Return the summary of a profile.

    Args:
        profile: The profile.
        before: The previous summary of the node.
        rewards: Rewards that `profile` contains in addition to those of the previous summary.
    """
    attempts: dict[str, list[str]] = {}
    for reward in rewards:
        if reward.kind == "reward":
            attempts.setdefault(reward.domain_token, []).append(attempt_id(reward))
    known = before.domains if before else {}
    return ProfileSummary(
        node_id=profile.node_id,
        owner=profile.owner,
        last_seq=profile.last_seq,
        domains={
            token: _domain_summary(evidence, known.get(token), attempts.get(token, []))
            for token, evidence in profile.domains.items()
        },
    )


def _domain_summary(evidence: DomainEvidence, before: DomainSummary | None, attempts: list[str]) -> DomainSummary:
    rewarded = tuple(dict.fromkeys((*(before.rewarded[-KEPT_ATTEMPTS:] if before else ()), *attempts)))
    return DomainSummary(
        count=evidence.count,
        mean=evidence.mean,
        losses=losses_in(evidence),
        newest_at=evidence.scores[-1].ended_at if evidence.scores else 0.0,
        rewarded=rewarded[-WINDOW:],
    )


def agrees(summary: ProfileSummary, profile: NodeProfile) -> bool:
    """Return whether a summary is that of a profile, except for the attempts that it names."""
    domains = {token: replace(domain, rewarded=()) for token, domain in summary.domains.items()}
    return replace(summary, domains=domains) == summary_of(profile)


class SummaryWriter:
    """Writes summaries to the bucket of profiles, next to the profile of the same node, by compare-and-set.

    A summary that is missing, or does not agree with its profile, is stale.

    Args:
        bus: A connected bus.
        profiles: The profiles, by key.
    """

    def __init__(self, bus: Bus, profiles: Mapping[str, NodeProfile]) -> None:
        self._bucket = bus.bucket("nodes", ProfileSummary)
        self._profiles = profiles
        self._stored: dict[str, ProfileSummary] = {}
        """Key of the profile -> its summary as stored."""
        self._revisions: dict[str, int] = {}
        self._check_at: dict[str, float] = {}
        """Key of a profile -> monotonic time at which its summary is checked, and written if it does not agree."""

    @property
    def unchecked(self) -> int:
        """Number of summaries that have to be checked."""
        return len(self._check_at)

    async def load(self) -> None:
        """Load the stored summaries."""
        reader = self._bucket.reader(SUMMARY_KEYS)
        try:
            while not reader.caught_up:
                for entry in await reader.batch():
                    self._revisions[_profile_key(entry.key)] = entry.revision
                    if entry.key == entry.value.key:
                        self._stored[entry.value.node_key] = entry.value
                for key, revision in reader.unreadable.items():
                    self._revisions[_profile_key(key)] = revision
        finally:
            await reader.stop()

    def is_stale(self, key: str, profile: NodeProfile) -> bool:
        """Return whether the stored summary of a profile is missing, or does not agree with it."""
        stored = self._stored.get(key)
        return stored is None or not agrees(stored, profile)

    async def write(self, profile: NodeProfile, rewards: Iterable[Reward] = ()) -> None:
        """Write the summary of a profile that has been stored.

        Args:
            profile: The profile.
            rewards: Rewards that it contains in addition to those of the previous summary.

        Raises:
            BusUnavailable: The server has not answered.
        """
        key, rewards = profile.key, tuple(rewards)
        while True:
            summary = summary_of(profile, self._stored.get(key), rewards)
            try:
                self._revisions[key] = await self._bucket.update(summary.key, summary, self._revisions.get(key, 0))
            except Conflict:
                stored = await self._read(key)
                if stored is not None and (stored.last_seq > profile.last_seq or agrees(stored, profile)):
                    return  # another replica has stored the same profile or a newer one, and its summary
                continue
            self._stored[key] = summary
            return

    def check_later(self, key: str, at: float) -> None:
        """Have the summary of a profile checked by the first `write_stale` after the monotonic time `at`."""
        self._check_at[key] = at

    async def write_stale(self, now: float, unwritten: Container[str]) -> None:
        """Check the summaries whose time has come, and write those that do not agree with their profiles.

        Args:
            now: Monotonic time.
            unwritten: Keys of profiles that are not stored yet; their summaries are written after them.

        Raises:
            BusUnavailable: The server has not answered.
        """
        due = [key for key, check_at in self._check_at.items() if check_at <= now and key not in unwritten]
        await for_each(due, self._write_if_stale)

    async def _write_if_stale(self, key: str) -> None:
        profile = self._profiles.get(key)
        if profile is not None and self.is_stale(key, profile):
            await self.write(profile)
        self._check_at.pop(key, None)

    async def follow(self, on_change: Callable[[str, ProfileSummary | None], Awaitable[None]]) -> None:
        """Follow the stored summaries.

        Args:
            on_change: Called with the key of the profile for each summary that another process has stored, and with
                the summary, or None for an unusable one.
        """
        reader = self._bucket.reader(SUMMARY_KEYS)
        await reader.start()
        try:
            while True:
                batch = await reader.batch()
                usable = [(entry.key, entry.revision, entry.value) for entry in batch]
                unusable = [(key, revision, None) for key, revision in reader.unreadable.items()]
                for key, revision, summary in (*usable, *unusable):
                    await self._on_entry(_profile_key(key), revision, summary, on_change)
        finally:
            await reader.stop()

    async def _on_entry(
        self,
        key: str,
        revision: int,
        summary: ProfileSummary | None,
        on_change: Callable[[str, ProfileSummary | None], Awaitable[None]],
    ) -> None:
        if revision <= self._revisions.get(key, 0):
            return
        self._revisions[key] = revision
        if summary is None or summary.node_key != key:
            self._stored.pop(key, None)
            await on_change(key, None)
        else:
            self._stored[key] = summary
            await on_change(key, summary)

    async def _read(self, key: str) -> ProfileSummary | None:
        """Return the stored summary of a profile, and keep its revision; None without a usable one."""
        self._stored.pop(key, None)
        try:
            entry = await self._bucket.get(summary_key(key))
        except Undecodable:
            self._revisions[key] = await self._bucket.revision(summary_key(key))
            return None
        self._revisions[key] = entry.revision if entry else 0
        if entry is None or entry.value.key != entry.key:
            return None
        self._stored[key] = entry.value
        return entry.value


def _profile_key(key: str) -> str:
    """Return the key of the profile that belongs to the key of a summary."""
    return key.rpartition(".")[0]
