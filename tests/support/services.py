"""Phases as tests start them: MATCH waits for announcements for a tenth of a second only, because hosts are few."""

from functools import partial

from loom.phases.match.timings import MatchTimings
from loom.runner import services
from loom.runner.timings import ServiceTimings

QUICK_START = ServiceTimings(match=MatchTimings(announce_wait_s=0.1))

running_phases = partial(services.running_phases, timings=QUICK_START)
"""`loom.runner.services.running_phases`; a test that passes other times starts from QUICK_START."""
