"""The times of all services of a process."""

from dataclasses import dataclass

from loom.agents.host.timings import HostTimings
from loom.phases.adapt.timings import AdaptTimings
from loom.phases.evaluate.timings import EvaluateTimings
from loom.phases.execute.timings import ExecuteTimings
from loom.phases.match.timings import MatchTimings
from loom.phases.scale.timings import ScaleTimings
from loom.phases.sense.timings import SenseTimings


@dataclass(frozen=True)
class ServiceTimings:
    """Waits and intervals of each service."""

    host: HostTimings = HostTimings()
    sense: SenseTimings = SenseTimings()
    match: MatchTimings = MatchTimings()
    scale: ScaleTimings = ScaleTimings()
    execute: ExecuteTimings = ExecuteTimings()
    evaluate: EvaluateTimings = EvaluateTimings()
    adapt: AdaptTimings = AdaptTimings()
