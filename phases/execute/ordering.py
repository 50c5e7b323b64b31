"""The order of a run's events: each one once, by number, and what to do about a gap. Pure."""

from collections.abc import Iterator, Sequence

from loom.schemas.run import RunEvent

GAP_S = 1.0
"""Time a host has to send a missing event again."""
MOST_ASKS = 2
"""Requests for the events of one gap; then the gap is accepted."""


class EventOrder:
    """Sorts events by number; those behind a gap are held until the gap is closed, answered or accepted.

    A gap within one message is no loss: a host packs what it keeps, and it does not keep heartbeats.

    Args:
        next_n: Number of the first event wanted.
    """

    def __init__(self, next_n: int) -> None:
        self.next_n = next_n
        self._held: dict[int, RunEvent] = {}
        self._asks = 0
        self._asked_at = 0.0

    def take(self, events: Sequence[RunEvent], now: float) -> list[RunEvent]:
        """Return what may be passed on after a message with `events` came at monotonic time `now`.

        A last event is passed on at once. A heartbeat numbered 0 is a stand-in and has no place in the order.
        """
        ready: list[RunEvent] = []
        answered = self._asks >= MOST_ASKS and now - self._asked_at >= GAP_S
        joined = False
        for event in events:
            if event.final:
                return [*ready, *self._release(), event]
            if event.n == 0 and event.kind == "heartbeat":
                ready.append(event)
                continue
            if event.n == 0:  # an answer to a request begins with the first event
                joined = answered = True
            if event.n > self.next_n and not joined:
                self._held[event.n] = event
            elif event.n >= self.next_n:
                ready.extend(self._release(below=event.n))
                ready.append(event)
                self.next_n = event.n + 1
            joined = joined or event.n < self.next_n
            ready.extend(self._contiguous())
        if answered:
            ready.extend(self._release())
        if not self._held:
            self._asks = 0
        return ready

    def asks(self, now: float) -> bool:
        """Whether missing events are to be requested now, from `next_n` on; True counts as the request."""
        if not self._held or self._asks >= MOST_ASKS or (self._asks and now - self._asked_at < GAP_S):
            return False
        self._asks, self._asked_at = self._asks + 1, now
        return True

    def _contiguous(self) -> Iterator[RunEvent]:
        """Release what is held and follows without a gap."""
        while (event := self._held.pop(self.next_n, None)) is not None:
            self.next_n += 1
            yield event

    def _release(self, below: int | None = None) -> Iterator[RunEvent]:
        """Release what is held, in order and whatever is missing between."""
        for n in sorted(self._held):
            if below is None or n < below:
                event = self._held.pop(n)
                if n >= self.next_n:
                    self.next_n = n + 1
                    yield event
