"""One delivery of a stored message: its metadata, its slot, and its turn among the deliveries of the process."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b

from loom.bus.hops.isolation import SharedExclusiveLock
from loom.bus.natsio.ack_metadata import AckMetadata, ack_metadata
from loom.bus.natsio.transport.message import Msg

SUSPECT_AFTER = 3
"""Deliveries after which a message is a suspect, which is handled while no other message is."""
DEAD_AFTER = 10
"""Deliveries after which a message is not handled any more."""
SPREAD_S = 0.5
"""Seconds over which the start of the suspects of a process is spread."""


class Slots:
    """The slots of a lane: how many deliveries it may process at once."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.taken = 0
        self.waiting = 0
        """Deliveries that only wait for the cluster to become less busy; each of them also takes a slot."""
        self.recalled = asyncio.Event()
        """Set when the process stops: its deliveries are to be given back."""

    @property
    def free(self) -> int:
        """How many more deliveries the lane may process."""
        return self.total - self.taken


class Delivery:
    """A message that is being processed.

    Args:
        lock: Isolates the suspects of the process.
    """

    def __init__(self, msg: Msg, slots: Slots, lock: SharedExclusiveLock) -> None:
        self.msg = msg
        self.subject = msg.subject
        self.facts = ack_metadata(msg.reply)
        self.received = 0.0
        """Server time at which the message was received."""
        self.slots = slots
        self.recalled = slots.recalled
        self.on_recall: Callable[[], None] | None = None
        """Called by `recall`, for handlers that cannot await `recalled`."""
        self._lock = lock
        self._holds_lock = False

    @property
    def origin(self) -> str:
        """The stored message itself, by the kind of its stream and its sequence: the same at every delivery.

        The ids of messages that follow from it contain it. A count of steps would not do: two copies of a task on
        paths of different length reach the same number. The hop of the later copy would then be a duplicate.
        """
        return f"{self.subject.split('.')[1]}-{self.facts.stream_seq}"

    def seq_in(self, stream: str) -> int:
        """Return the sequence of the message if `stream` is the stream that holds it, else 0."""
        return self.facts.stream_seq if self.facts.stream == stream else 0

    @property
    def is_suspect(self) -> bool:
        """Whether the message was delivered so often that it may be what ends the process."""
        return self.facts.delivered > SUSPECT_AFTER

    @property
    def exceeded_max_deliveries(self) -> bool:
        """Whether the message was delivered too often to be handled again."""
        return self.facts.delivered > DEAD_AFTER

    def recall(self) -> None:
        """Ask the handler to give the delivery back, because the process stops."""
        self.recalled.set()
        if self.on_recall is not None:
            self.on_recall()

    async def acquire(self) -> None:
        """Wait for the turn of this delivery in the process."""
        if self.is_suspect and not self.exceeded_max_deliveries:
            await asyncio.sleep(SPREAD_S * suspect_order(self.facts))
        await self._lock.acquire(exclusive=self.is_suspect)
        self._holds_lock = True

    def release(self) -> None:
        """Let other deliveries in: this one has ended, or has proved harmless to the process. Safe to call twice."""
        if self._holds_lock:
            self._holds_lock = False
            self._lock.release(exclusive=self.is_suspect)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count this delivery as one that only waits while the block runs; other deliveries are let in."""
        self.release()
        self.slots.waiting += 1
        try:
            yield
        finally:
            self.slots.waiting -= 1

    @contextmanager
    def released_slot(self) -> Iterator[None]:
        """Take no slot while the block runs. Afterwards the lane may for a while exceed its slots by this delivery."""
        self.slots.taken -= 1
        try:
            yield
        finally:
            self.slots.taken += 1


def suspect_order(facts: AckMetadata) -> float:
    """Return the position of a delivery among suspects, from 0 (first) to 1 (last), different at each delivery.

    A suspect that ends the process takes down all suspects behind it, and all of them come back together with equal
    counts. So two messages have one order at an even count and the reverse order at the next, odd count. Of any two,
    the harmless message has been first once.
    """
    pair, reverse = divmod(facts.delivered, 2)
    digest = blake2b(b"%d %d" % (facts.stream_seq, pair), digest_size=8).digest()
    forward = int.from_bytes(digest) / 2**64
    return 1 - forward if reverse else forward
