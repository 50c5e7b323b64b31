"""Profiles in memory: those that were not changed lately are kept encoded, in a third of the space."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping

from loom.schemas.base import decode, encode
from loom.schemas.learning.profile import NodeProfile

DECODED_SCORES = 300_000
"""Most scores of all profiles that are kept decoded; about 60 MB."""


REBUILD_SCORES = 100_000
"""The same of a rebuild, which needs its memory in addition."""


class ProfileStore(Mapping[str, NodeProfile]):
    """Maps a key to a profile; changed profiles stay decoded until many others have changed.

    Args:
        decoded_scores: Most scores of all profiles that are kept decoded.
    """

    def __init__(self, decoded_scores: int = DECODED_SCORES) -> None:
        self._limit = decoded_scores
        self._decoded: OrderedDict[str, NodeProfile] = OrderedDict()
        """Key -> profile; the one that was changed first comes first."""
        self._encoded: dict[str, bytes] = {}
        self._last_seqs: dict[str, int] = {}
        self._scores = 0
        """Scores of the decoded profiles."""

    def __getitem__(self, key: str) -> NodeProfile:
        profile = self._decoded.get(key)
        return decode(self._encoded[key], NodeProfile) if profile is None else profile

    def __setitem__(self, key: str, profile: NodeProfile) -> None:
        before = self._decoded.pop(key, None)
        if before is not None:
            self._scores -= _scores(before)
        self._encoded.pop(key, None)
        self._decoded[key] = profile
        self._last_seqs[key] = profile.last_seq
        self._scores += _scores(profile)
        while self._scores > self._limit and len(self._decoded) > 1:
            oldest, unused = self._decoded.popitem(last=False)
            self._scores -= _scores(unused)
            self._encoded[oldest] = encode(unused)

    def __iter__(self) -> Iterator[str]:
        return iter(self._last_seqs)

    def __len__(self) -> int:
        return len(self._last_seqs)

    def __contains__(self, key: object) -> bool:
        return key in self._last_seqs

    def pop(self, key: str) -> NodeProfile | None:
        """Remove and return a profile; None for an unknown key."""
        if key not in self:
            return None
        profile = self[key]
        if self._decoded.pop(key, None) is not None:
            self._scores -= _scores(profile)
        self._encoded.pop(key, None)
        del self._last_seqs[key]
        return profile

    def last_seq(self, key: str) -> int | None:
        """Return the last sequence of a profile, without decoding it; None for an unknown key."""
        return self._last_seqs.get(key)

    def copy(self) -> "ProfileStore":
        """Return a store with the same profiles, which shares their memory and does not change with this one."""
        copy = ProfileStore(self._limit)
        copy._decoded, copy._encoded = self._decoded.copy(), self._encoded.copy()
        copy._last_seqs, copy._scores = self._last_seqs.copy(), self._scores
        return copy


def _scores(profile: NodeProfile) -> int:
    return sum([len(evidence.scores) for evidence in profile.domains.values()])
