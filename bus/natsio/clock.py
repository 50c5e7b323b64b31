"""The server's time in this process: the monotonic clock plus an offset that is measured now and then.

The wall clock is read once, for a first guess: it may step by any amount, forwards or backwards, at any moment. The
monotonic clock does not step, but stands still while a machine is suspended: hence the measurements after a reconnect
and after the two clocks have moved apart.
"""

import math
import time

STEP_S = 0.5
"""How far wall and monotonic clock move apart before the offset is measured again."""
SLACK_S = 0.001
"""What rounding and the drift of a clock may add to the difference of two measurements."""


class ServerClock:
    """The server's time, as far as it has been measured; before that, the wall clock's at construction."""

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
        """Seconds by which this machine's wall clock is ahead of the server's; negative: behind."""
        return time.time() - self.now()

    def measure(self, server_time: float, asked: float, answered: float) -> None:
        """Take over the server's time from one answer, unless a more precise measurement agrees with it.

        Args:
            server_time: What the answer states, seconds since the epoch.
            asked: When the request was sent, in monotonic time.
            answered: When the answer arrived, in monotonic time; `server_time` lies somewhere between the two.
        """
        offset_s = server_time - (asked + answered) / 2
        error_s = (answered - asked) / 2
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
