"""What phases left out of what node hosts sent, host by host: for the authors of hosts to read."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from msgspec import Meta

from loom.schemas.base import Count, Message, Name, Timestamp, total

Part = Literal["announcements", "offers", "bids", "events", "answers"]
EVERYBODYS: Part = "announcements"
"""What each reader of a cluster gets: one that is left out is counted by all of them."""
MAX_HOSTS = 100
MAX_REASON = 200
"""Characters of a reason."""


class LeftOut(Message, frozen=True, kw_only=True):
    """What was left out of one host's messages."""

    counts: Annotated[dict[Name, Count], Meta(max_length=16)] = {}
    """Part -> how many."""
    last: Name = ""
    """Why, of the last one; printable."""
    at: Timestamp = 0.0
    """When, by the clock of the process that left it out."""

    def plus(self, part: Part, reason: str, at: float) -> "LeftOut":
        """Return this with one more."""
        counts = {**self.counts, part: total(self.counts.get(part, 0), 1)}
        return LeftOut(counts=counts, last=as_reason(reason), at=at)

    @property
    def words(self) -> str:
        """The counts and the last reason: `3 offers, 1 event (last: Expected …)`."""
        parts = (f"{count:,} {part[:-1] if count == 1 else part}" for part, count in sorted(self.counts.items()))
        return f"{', '.join(parts)} (last: {self.last})"


def as_reason(text: str) -> str:
    """Return the text on one printable line, at most 200 characters."""
    line = " ".join(text[: 2 * MAX_REASON].split())
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)[:MAX_REASON]


def together(reports: Iterable[Mapping[str, LeftOut]]) -> dict[str, LeftOut]:
    """Return what several processes report as one, by host: announcements, which all of them get, count once."""
    found: dict[str, LeftOut] = {}
    for report in reports:
        for host_id, one in report.items():
            found[host_id] = _sum(found[host_id], one) if host_id in found else one
    return {host_id: found[host_id] for host_id in sorted(found)}


def _sum(one: LeftOut, other: LeftOut) -> LeftOut:
    counts = dict(one.counts)
    for part, count in other.counts.items():
        known = counts.get(part, 0)
        counts[part] = max(known, count) if part == EVERYBODYS else total(known, count)
    newest = max(one, other, key=lambda report: report.at)
    return LeftOut(counts=counts, last=newest.last, at=newest.at)
