"""One attempt to hand over a stored message, and what its handler may do with it."""

import asyncio
from collections.abc import Callable
from hashlib import blake2b

from loom.bus.isolation import SharedExclusiveLock
from loom.bus.natsio.ack_metadata import AckMetadata, ack_metadata
from loom.bus.natsio.transport.message import Msg

SUSPECT_AFTER = 3
"""Deliveries after which a message is handled alone."""
DEAD_AFTER = 10
"""Deliveries after which it is not handled any more."""
SPREAD_S = 0.5
"""Time over which the suspects of a process are spread."""


class Slots:
    """A lane's room: how many deliveries it may have in hand."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.taken = 0
        self.waiting = 0
        """Deliveries in hand that only wait for the cluster to become less busy."""
        self.recalled = asyncio.Event()
        """Set when the process stops: give the work back."""

    @property
    def free(self) -> int:
        """How many more there is room for."""
        return self.total - self.taken


class Delivery:
    """A message in hand: its facts, its slot, and its place among the others of the process."""

    def __init__(self, msg: Msg, slots: Slots, gate: SharedExclusiveLock) -> None:
        self.msg = msg
        self.subject = msg.subject
        self.facts = ack_metadata(msg.reply)
        self.received = 0.0
        """Server time it came here."""
        self.slots = slots
        self.recalled = slots.recalled
        self.on_recall: Callable[[], None] | None = None
        """Called when it is set, by whoever cannot wait for it."""
        self._gate = gate
        self._in_gate = False

    @property
    def origin(self) -> str:
        """The stored message itself, by the kind of its stream and its sequence: the same however often it comes.

        What follows from it is named after it. A count of steps would not do: twins of one task on paths of
        different length arrive at the same number, and the later one's hop would be dropped as a duplicate.
        """
        return f"{self.subject.split('.')[1]}-{self.facts.stream_seq}"

    def seq_in(self, stream: str) -> int:
        """Return the sequence of the message if `stream` is the one that holds it, else 0."""
        return self.facts.stream_seq if self.facts.stream == stream else 0

    @property
    def alone(self) -> bool:
        """Whether the message is suspect: delivered several times already."""
        return self.facts.delivered > SUSPECT_AFTER

    @property
    def dead(self) -> bool:
        """Whether it was delivered too often to be tried again."""
        return self.facts.delivered > DEAD_AFTER

    def recall(self) -> None:
        """Ask for the work back: the process stops."""
        self.recalled.set()
        if self.on_recall is not None:
            self.on_recall()

    async def enter(self) -> None:
        """Wait for this delivery's turn in the process."""
        if self.alone and not self.dead:
            await asyncio.sleep(SPREAD_S * place(self.facts))
        await self._gate.enter(alone=self.alone)
        self._in_gate = True

    def release(self) -> None:
        """Let others in: this delivery has shown that it does not kill the process, or has ended."""
        if self._in_gate:
            self._in_gate = False
            self._gate.leave(alone=self.alone)


def place(facts: AckMetadata) -> float:
    """Return where among suspects a delivery comes, from 0 first to 1 last: each time elsewhere.

    The suspect that kills the process takes down all who are behind it, and they come back together, their counts
    grown alike. So two deliveries stand in one order at an even count and in the reverse order at the next, odd one:
    whoever is no killer has once been before it.
    """
    pair, reverse = divmod(facts.delivered, 2)
    digest = blake2b(b"%d %d" % (facts.stream_seq, pair), digest_size=8).digest()
    forward = int.from_bytes(digest) / 2**64
    return 1 - forward if reverse else forward
