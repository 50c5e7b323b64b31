"""An EXECUTE in a process of its own that dies or stops while a delegation is under way."""

import signal
from collections.abc import Callable
from typing import Any

from loom.bus.natsio.publishing import PubAckFuture
from loom.phases.execute.delegation import Delegations
from loom.phases.execute.run_stream import RunStream
from support.crash_process import Orders, Patch, after, before, begins_a_task, phase, sent

POINTS: dict[str, Patch] = {
    "heard": before(Delegations, "_run"),
    "noted": after(Delegations, "_record"),
    "stored": sent(PubAckFuture, "ack", begins_a_task),
    "ended": before(RunStream, "send_answer"),
    "handed": after(RunStream, "send_answer"),
}
"""Where it may die or stop -> how to have it do so."""


async def execute(
    say: Callable[[Any], None], orders: Orders, url: str, namespace: str, point: str, how: signal.Signals
) -> None:
    """Run EXECUTE, which kills or stops itself when a delegation first reaches `point`."""
    await phase(say, orders, url, namespace, "execute", point, how, points=POINTS)
