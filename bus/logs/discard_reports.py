"""Reports on what phases discarded of the messages of each node host, for the authors of hosts."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from msgspec import Meta

from loom.schemas.base import Count, Message, Name, Timestamp, total

Part = Literal["announcements", "offers", "bids", "events", "answers"]
BROADCAST: Part = "announcements"
"""Messages that all readers receive: each of them counts a discarded one."""
MAX_HOSTS = 100
MAX_REASON = 200
"""Most characters of a reason."""


class DiscardReport(Message, frozen=True, kw_only=True):
    """What was discarded of the messages of one host."""

    counts: Annotated[dict[Name, Count], Meta(max_length=16)] = {}
    """Part -> number of discards."""
    last: Name = ""
    """Reason of the last discard; printable."""
    at: Timestamp = 0.0
    """Time of the last discard, by the wall clock of the process that discarded it."""

    def plus(self, part: Part, reason: str, at: float) -> "DiscardReport":
        """Return the report with one more discard."""
        counts = {**self.counts, part: total(self.counts.get(part, 0), 1)}
        return DiscardReport(counts=counts, last=as_reason(reason), at=at)

    @property
    def summary(self) -> str:
        """The counts and the last reason as text: `3 offers, 1 event (last: Expected …)`."""
        parts = (f"{count:,} {part[:-1] if count == 1 else part}" for part, count in sorted(self.counts.items()))
        return f"{', '.join(parts)} (last: {self.last})"


def as_reason(text: str) -> str:
    """Return the text as one printable line of at most 200 characters."""
    line = " ".join(text[: 2 * MAX_REASON].split())
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)[:MAX_REASON]


def merged_reports(reports: Iterable[Mapping[str, DiscardReport]]) -> dict[str, DiscardReport]:
    """Return the sum of the reports of several processes, by host; announcements, which all receive, count once."""
    by_host: dict[str, DiscardReport] = {}
    for report in reports:
        for host_id, left_out in report.items():
            by_host[host_id] = _sum(by_host[host_id], left_out) if host_id in by_host else left_out
    return {host_id: by_host[host_id] for host_id in sorted(by_host)}


def _sum(left: DiscardReport, right: DiscardReport) -> DiscardReport:
    counts = dict(left.counts)
    for part, count in right.counts.items():
        other = counts.get(part, 0)
        counts[part] = max(other, count) if part == BROADCAST else total(other, count)
    newest = max(left, right, key=lambda report: report.at)
    return DiscardReport(counts=counts, last=newest.last, at=newest.at)
