"""The times of all services of a process."""

from dataclasses import dataclass

from loom.agents.host.timings import HostTimings
from loom.phases.execute.timings import ExecuteTimings
from loom.phases.match.timings import MatchTimings


@dataclass(frozen=True)
class ServiceTimings:
    """Waits and intervals of each service."""

    host: HostTimings = HostTimings()
    match: MatchTimings = MatchTimings()
    execute: ExecuteTimings = ExecuteTimings()
