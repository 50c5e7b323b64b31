"""The subjects on which run events arrive: one subscription, and a random key for each request stream of a run."""

from collections import OrderedDict
from collections.abc import Callable
from secrets import token_hex
from typing import Any

from loom.bus.bus import Bus
from loom.bus.host_directory import HostKey
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.transport.message import Msg

KEY_BYTES = 8
"""Random bytes of a key: a host cannot guess the key of another host's run."""
CLOSED_KEYS = 4096
"""Closed subjects that are remembered, at most."""
UNEXPECTED = "no open run has this key, or the run belongs to another host"

MessageHandler = Callable[[Msg], None]


class EventSubjects:
    """The open event subjects of one EXECUTE replica.

    A message is delivered only if every token of its subject is that of an open subject. So its owner and host are
    those of the award. Any other message is counted as discarded, for the owner and the host in its subject.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._open: dict[str, MessageHandler] = {}
        self._closed: OrderedDict[str, None] = OrderedDict()
        """Closed subjects on which a host may still publish without an error of its own."""
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Subscribe to the events of this replica's runs."""
        subject = self._bus.subjects.of("event", "*", "*", self._bus.instance, "*")
        self._subscription = await self._bus.connection.subscribe_sync(subject, self._on_message)

    async def stop(self) -> None:
        """End the subscription. Safe to call twice or unstarted."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            self._bus.connection.unsubscribe(subscription)

    def open(self, host: HostKey, on_message: MessageHandler) -> str:
        """Return a new subject for the events of a run on `host`; its messages go to `on_message` until `close`."""
        subject = self._bus.subjects.of("event", host.owner, host.host_id, self._bus.instance, token_hex(KEY_BYTES))
        self._open[subject] = on_message
        return subject

    def close(self, subject: str, *, expect_more: bool = True) -> None:
        """Close a subject. Safe to call twice.

        Args:
            subject: A subject that `open` has returned.
            expect_more: Whether the host may still publish there, because the run moved, was stopped, or repeats its
                last event. Further messages are then dropped without being counted.
        """
        if self._open.pop(subject, None) is None or not expect_more:
            return
        self._closed[subject] = None
        if len(self._closed) > CLOSED_KEYS:
            self._closed.popitem(last=False)

    def _on_message(self, msg: Msg) -> None:
        on_message = self._open.get(msg.subject)
        if on_message is not None:
            on_message(msg)
        elif msg.subject not in self._closed:
            _, owner, host_id, _, _ = msg.subject.rsplit(".", 4)
            count_discarded(self._bus, HostKey(owner, host_id), "event_unexpected", UNEXPECTED)


def count_discarded(bus: Bus, host: HostKey, event: str, reason: str, **facts: Any) -> None:
    """Count and log an event that is discarded, for its host."""
    bus.discards.add_from_host(str(host), "events", event, reason=reason, **facts)
