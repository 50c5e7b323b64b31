"""Helpers of the bus tests: connections, recorded messages, small envelopes."""

from collections.abc import Awaitable, Callable
from typing import Any

from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.schemas.envelope import Envelope
from loom.schemas.errors import BusUnavailable
from loom.schemas.task import TaskAd
from support.wait import until

Connect = Callable[..., Awaitable[Bus]]
"""Opens a connection; `url`, `namespace` and `role` may be given."""


class MessageRecorder:
    """The messages a subscription got, in order."""

    def __init__(self) -> None:
        self.messages: list[Msg] = []

    async def __call__(self, msg: Msg) -> None:
        self.messages.append(msg)

    @property
    def bodies(self) -> list[bytes]:
        return [msg.data for msg in self.messages]

    async def count(self, wanted: int, within_s: float = 20) -> list[Msg]:
        await until(lambda: len(self.messages) >= wanted, within_s=within_s, what=f"{wanted} messages")
        return self.messages


async def alive(bus: Bus) -> bool:
    """Whether the server answers."""
    try:
        await bus.requests.flush(timeout_s=0.5)
    except (TimeoutError, BusUnavailable):
        return False
    return True


async def back(bus: Bus) -> None:
    """Wait until the connection works again."""
    await until(lambda: alive(bus), within_s=10, what="the connection is back")


def envelope(task_id: str = "t1", *, deadline: float = 4e9, **fields: Any) -> Envelope:
    """A small envelope."""
    return Envelope(ad=TaskAd(task_id=task_id, description="count the words"), deadline=deadline, **fields)
