"""The times of EXECUTE."""

from dataclasses import dataclass

HEARTBEAT_S = 2.0
"""Seconds between two heartbeats of a host."""


@dataclass(frozen=True)
class ExecuteTimings:
    """Waits and intervals of EXECUTE, in seconds."""

    accept_s: float = 3.0
    """Wait for the first event of a run. On a machine at its limit hundreds of hosts answered only after one second."""
    silence_s: float = 3 * HEARTBEAT_S + 0.5
    """Wait for the next event of a run: three heartbeats missed."""
    absent_s: float = 1.0
    """Time a host may have no subscription: it may reconnect a little later than this process after an outage."""
    repeat_request_s: float = 1.0
    """Silence after which a request is repeated; a slow host must not receive it many times."""
    repeat_absent_s: float = 0.3
    """The same while the server reports no subscriber."""
    plain_absent_s: float = 3.0
    """Time for which the request to a plain node is repeated while the server reports no subscriber."""
    repeat_stop_s: float = 1.0
    """Interval between the stop messages of a run."""
    poll_record_s: float = 5.0
    """Longest delay with which the end of a delegated task is found when its result message is lost."""
