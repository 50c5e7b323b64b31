"""The times of a node host."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HostTimings:
    """Intervals and limits of a node host, in seconds."""

    announce_s: float = 3.0
    """Interval between announcements."""
    heartbeat_s: float = 2.0
    """Interval between the heartbeats of a run."""
    requested_announce_s: float = 1.0
    """Average interval between announcements on request."""
    max_announce_delay_s: float = 0.1
    """Longest random delay of an announcement on request, so that many hosts do not announce at the same moment."""
    cancel_grace_s: float = 30.0
    """Time after which a run that ignores its cancel loses its slot."""
    watchdog_check_s: float = 0.5
    """Interval between two checks of the event loop."""
    blocked_s: float = 1.0
    """Time without a turn after which the event loop counts as blocked."""
    blocked_warning_s: float = 5.0
    """Time without a turn after which the watchdog logs a warning."""
