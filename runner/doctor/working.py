"""Checks that phases that answer also work: their reports against the messages that wait on the server."""

import asyncio
from collections.abc import Iterator
from typing import Final, NamedTuple

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.hops.health import Health
from loom.bus.logs import discard_reports
from loom.bus.natsio.stored_message import last_message
from loom.bus.service_discovery import health_reports
from loom.bus.topology import Inspection
from loom.runner.doctor.findings import Finding, fail, ok, warn
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import BusUnavailable

LOOK_AGAIN_S: Final = 2.0
"""Between two looks at what may stand still; a phase at work moves on within it."""
OLD_S: Final = 120.0
"""No phase but EXECUTE keeps a message in hand for so long, nor ADAPT a profile unwritten."""
FULL: Final = 0.8
"""Share of `max_in_flight` from which SENSE admits nothing but what is urgent."""
RESTART: Final = "see its log, then start it again"
HOSTS: Final = 10
"""Hosts of which what was left out is listed."""


class Look(NamedTuple):
    """What waits for the phases and what they report, at one time."""

    waiting: dict[str, int]
    """Phase -> messages its consumers have not handed out."""
    last_reward: int
    """Sequence of the last reward in the stream."""
    reports: dict[str, list[Health]]

    def handled(self, phase: str) -> int:
        """Return how many messages all processes of a phase have handled."""
        return sum(report.handled for report in self.reports.get(phase, ()))

    def idle(self, phase: str) -> bool:
        """Return whether messages wait for a phase whose processes answer and have none in hand."""
        reports = self.reports.get(phase, ())
        return bool(reports) and self.waiting.get(phase, 0) > 0 and not any(report.in_hand for report in reports)

    def rewards_behind(self) -> int:
        """Return how many sequences of the stream of rewards no ADAPT has read."""
        read = [report.last_seq for report in self.reports.get("adapt", ()) if report.last_seq is not None]
        return max(0, self.last_reward - max(read)) if read else 0

    def is_calm(self) -> bool:
        """Return whether a second look can show no more."""
        return not self.rewards_behind() and not any(map(self.idle, self.waiting))


async def working(bus: Bus, seen: Inspection, config: ClusterConfig) -> list[Finding]:
    """Return what is wrong with phases that answer; looks twice, 2 s apart, where something may stand still."""
    before = after = await _look(bus, seen, config)
    if not before.is_calm():
        await asyncio.sleep(LOOK_AGAIN_S)
        after = await _look(bus, await topology.inspect(bus, config), config)
    return list(judged(before, after)) or [ok("work", "no phase stands still")]


async def _look(bus: Bus, seen: Inspection, config: ClusterConfig) -> Look:
    stream = seen.streams[bus.subjects.stream("REWARDS")]
    last = await _last_reward(bus) if stream.info is not None else 0
    return Look(waiting_in(seen, config), last, await health_reports(bus))


async def _last_reward(bus: Bus) -> int:
    subject = bus.subjects.of("reward", "*", "*", "*", "*")
    try:
        last = await last_message(bus.jetstream, bus.subjects.stream("REWARDS"), subject)
    except BusUnavailable:
        return 0  # the stream has lost its leader since the inspection, whose findings name the cause
    return last.seq if last is not None else 0


def waiting_in(seen: Inspection, config: ClusterConfig) -> dict[str, int]:
    """Return how many messages wait for each phase; the intake counts while there is room in flight."""
    infos = {name: part.info for name, part in seen.consumers.items() if part.info is not None}
    tasks = [info for name, info in infos.items() if not name.startswith("intake_")]
    in_flight = sum(int(info.get("num_pending", 0)) + int(info.get("num_ack_pending", 0)) for info in tasks)
    waiting: dict[str, int] = {}
    for name, info in infos.items():
        phase = "sense" if name.startswith("intake_") else name.partition("_")[0]
        if name.startswith("intake_") and in_flight >= FULL * config.max_in_flight:
            continue
        waiting[phase] = waiting.get(phase, 0) + int(info.get("num_pending", 0))
    return waiting


def judged(before: Look, after: Look) -> Iterator[Finding]:
    """Judge two looks, which may be one and the same."""
    for phase, reports in after.reports.items():
        about = f"work {phase}"
        if failure := next((report.failure for report in reports if report.failure), ""):
            yield fail(about, f"an essential task has failed: {failure}", RESTART)
        oldest_s = max(report.oldest_s for report in reports)
        if phase != "execute" and oldest_s > OLD_S:
            yield fail(about, f"has had something in hand for {oldest_s:.0f} s", RESTART)
        if before.idle(phase) and after.idle(phase) and before.handled(phase) == after.handled(phase):
            yield fail(about, f"waiting messages: {after.waiting[phase]}; none is taken", RESTART)
    yield from _rewards(before, after)
    yield from _discards(after)
    yield from _left_out(after)


def _rewards(before: Look, after: Look) -> Iterator[Finding]:
    behind = after.rewards_behind()
    if not behind or not before.rewards_behind():
        return
    if behind >= before.rewards_behind() + after.last_reward - before.last_reward:
        yield fail("work adapt", f"rewards not read: {behind}; none is being read", RESTART)
    else:
        yield warn("work adapt", f"rewards not read: {behind}", "it catches up: look again in a minute")


def _discards(after: Look) -> Iterator[Finding]:
    counts: dict[str, int] = {}
    for report in (report for reports in after.reports.values() for report in reports):
        for event, count in report.discards.items():
            counts[event] = counts.get(event, 0) + count
    if counts:
        listed = ", ".join(f"{count} {event}" for event, count in sorted(counts.items()))
        yield warn("discards", f"messages were left out: {listed}", "see the phases' logs for senders and reasons")


def _left_out(after: Look) -> Iterator[Finding]:
    """Report what hosts sent in vain, those of which it was lately first."""
    hosts = discard_reports.merged_reports(report.left_out for reports in after.reports.values() for report in reports)
    newest = sorted(hosts, key=lambda host_id: -hosts[host_id].at)
    for host_id in newest[:HOSTS]:
        what = f"of host {host_id}: {hosts[host_id].summary}"
        yield warn("left out", what, 'for its author: "What is forgiven" in docs/subjects.md')
    if len(newest) > HOSTS:
        yield warn("left out", f"something of {len(newest) - HOSTS} more hosts", "`loom host ls` lists them")
