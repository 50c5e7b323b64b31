"""An EXECUTE process that is killed or stopped while a delegation is in progress."""

import signal
from collections.abc import Callable
from typing import Any

from loom.bus.natsio.publishing import PubAckFuture
from loom.phases.execute.delegation import Delegations
from loom.phases.execute.run_stream import RunStream
from support.crash_process import ParentCommands, Patch, after, before, begins_a_task, phase, sent

POINTS: dict[str, Patch] = {
    "request received": before(Delegations, "_run"),
    "recorded": after(Delegations, "_record"),
    "stored": sent(PubAckFuture, "ack", begins_a_task),
    "ended": before(RunStream, "send_answer"),
    "answer sent": after(RunStream, "send_answer"),
}
"""Name of a crash point -> the patch that installs it."""


async def execute(
    send: Callable[[Any], None], commands: ParentCommands, url: str, namespace: str, point: str, how: signal.Signals
) -> None:
    """Run EXECUTE, which kills or stops its process when a delegation first reaches `point`."""
    await phase(send, commands, url, namespace, "execute", point, how, points=POINTS)
