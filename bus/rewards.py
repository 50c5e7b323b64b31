"""The reward topic: publishes rewards into the stream REWARDS, and reads them back."""

from collections.abc import AsyncIterator, Coroutine
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from loom.schemas.errors import BusUnavailable
from loom.schemas.identity import split_qualified
from loom.schemas.learning.reward import Reward
from loom.schemas.tokens import domain_token

if TYPE_CHECKING:
    from loom.bus.bus import Bus
    from loom.bus.natsio.publishing import PubAck


class RewardBus:
    """Publishes rewards, follows new ones and replays stored ones.

    Args:
        bus: A connected bus; may be set later, but before the first use of a method.
    """

    def __init__(self, bus: "Bus | None" = None) -> None:
        self.bus = bus

    def publish(self, reward: Reward) -> "Coroutine[Any, Any, PubAck]":
        """Store a reward, and return an awaitable of the server's acknowledgement.

        Any client with the permission may publish; a reward that is published twice counts once.

        Raises:
            BusUnavailable: There is no bus, or the server does not acknowledge.
        """
        from loom.bus.hops.duplicates import store_once  # noqa: PLC0415 - imports nats-py, see _read

        bus = self._connected()
        # A revised score is a new message; the same one again is dropped within the server's duplicate window.
        digest = blake2b(repr(float(reward.score)).encode(), digest_size=4).hexdigest()
        subject = bus.subjects.of("reward", reward.source, reward.owner, reward.node_id, reward.domain_token)
        return store_once(bus, subject, reward, msg_id=f"{reward.reward_id}:{digest}")

    def subscribe(self, *, node_id: str | None = None, domain: str | None = None) -> AsyncIterator[Reward]:
        """Yield every reward that is published from the first step of the iteration on.

        Args:
            node_id: Rewards of this node only: `node_id`, or `owner.node_id` if the owner is not `local`.
            domain: Rewards in this domain only.
        """
        return self._read(node_id, domain, deliver="new", to_the_end=False)

    def replay(self, *, node_id: str | None = None, domain: str | None = None) -> AsyncIterator[Reward]:
        """Yield every reward that the stream contains, in stream order, and end; arguments as for `subscribe`."""
        return self._read(node_id, domain, deliver="all", to_the_end=True)

    async def _read(
        self, node_id: str | None, domain: str | None, *, deliver: str, to_the_end: bool
    ) -> AsyncIterator[Reward]:
        # Both import nats-py, which the reward formulas of the subclass in loom.compat do not need.
        from loom.bus.natsio.ordered_consumer import OrderedConsumer  # noqa: PLC0415 - see above
        from loom.bus.stored_rewards import reward_in  # noqa: PLC0415 - see above

        bus = self._connected()
        node = split_qualified(node_id) if node_id else ("*", "*")
        subject = bus.subjects.of("reward", "*", *node, domain_token(domain) if domain else "*")
        consumer = OrderedConsumer(bus.jetstream, bus.subjects.stream("REWARDS"), filter=subject, deliver=deliver)
        try:
            while True:
                for message in await consumer.batch():
                    reward = reward_in(message, bus.subjects, bus.discards)
                    if reward is not None and reward.kind != "snapshot":  # a snapshot is not a reward of a node
                        yield reward
                if to_the_end and consumer.caught_up:
                    return
        finally:
            await consumer.stop()

    def _connected(self) -> "Bus":
        if self.bus is None:
            raise BusUnavailable("this RewardBus has no bus: pass one, or use the RewardBus of a running Runtime")
        return self.bus
