"""The server's time in this process: the monotonic clock plus a measured offset.

The wall clock is read once, for the first estimate, because it may step forwards or backwards at any moment. The
monotonic clock does not step, but stops while a machine is suspended. So the offset is measured again after a
reconnect, and when the two clocks have moved apart.
"""

import math
import time

STEP_S = 0.5
"""Difference between the changes of the two clocks, in seconds, after which the offset is measured again."""
SLACK_S = 0.001
"""Allowance for rounding and drift when two measurements are compared, in seconds."""


class ServerClock:
    """Returns the server's time; before the first measurement, the wall clock's as of construction."""

    def __init__(self) -> None:
        self._offset_s = self._gap_s = _gap_s()
        self._error_s = math.inf

    def now(self) -> float:
        """Return the server's time, seconds since the epoch."""
        return time.monotonic() + self._offset_s

    @property
    def measured(self) -> bool:
        """Whether the server's time has ever been measured."""
        return self._error_s < math.inf

    @property
    def wall_ahead_s(self) -> float:
        """Seconds by which this machine's wall clock is ahead of the server's; negative if it is behind."""
        return time.time() - self.now()

    def measure(self, server_time: float, sent_at: float, received_at: float) -> None:
        """Set the offset from one reply of the server, unless an earlier, more precise measurement agrees with it.

        Args:
            server_time: Time in the reply, seconds since the epoch.
            sent_at: Monotonic time at which the request was sent.
            received_at: Monotonic time at which the reply arrived; `server_time` is between the two.
        """
        offset_s = server_time - (sent_at + received_at) / 2
        error_s = (received_at - sent_at) / 2
        agree = abs(offset_s - self._offset_s) <= error_s + self._error_s + SLACK_S
        if agree and error_s > self._error_s:
            return
        self._offset_s, self._error_s = offset_s, error_s

    def has_stepped(self) -> bool:
        """Return whether the wall clock stepped, or the machine was suspended, since the last call."""
        gap_s, before_s = _gap_s(), self._gap_s
        self._gap_s = gap_s
        return abs(gap_s - before_s) > STEP_S


def _gap_s() -> float:
    return time.time() - time.monotonic()
