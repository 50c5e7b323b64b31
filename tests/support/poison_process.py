"""One phase in a process that is killed by every marked task and restarted each time, as by a supervisor.

Run as a script with server, namespace and phase as arguments. It prints a line for each death.
"""

import asyncio
import ctypes
import os
import signal
import sys
from typing import Any

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.hops import hop_loop
from loom.bus.hops.delivery import Delivery
from loom.bus.hops.outcomes import Outcome
from loom.phases.scale import Scale
from loom.phases.sense import Sense
from loom.runner.services import running_phases
from loom.schemas.envelope import Envelope, Phase
from loom.schemas.task import Submission

MARK = "deadly"
ACK_WAIT_S = 1.0
PR_SET_PDEATHSIG = 1
HANDLERS: dict[str, tuple[type[Any], str]] = {"sense": (Sense, "admit"), "scale": (Scale, "handle")}


def crash_on_marked_tasks(phase: str) -> None:
    """Have the phase's handler kill this process when it gets a marked task."""
    service, name = HANDLERS[phase]
    real = getattr(service, name)

    async def handle(self: Any, message: Submission | Envelope, delivery: Delivery) -> Outcome:
        if MARK in message.ad.context:
            os.kill(os.getpid(), signal.SIGKILL)
        outcome: Outcome = await real(self, message, delivery)
        return outcome

    setattr(service, name, handle)


def shorten_ack_wait() -> None:
    """Have unacknowledged messages delivered again after a second instead of half a minute."""
    real = topology.consumer

    def quick(bus: Bus, lane: topology.Lane) -> dict[str, Any]:
        return {**real(bus, lane), "ack_wait": int(ACK_WAIT_S * 1e9)}

    topology.consumer = quick
    hop_loop.IN_PROGRESS_S = ACK_WAIT_S / 5


async def serve(url: str, namespace: str, phase: Phase) -> None:
    async with running_phases(url, names=(phase,), namespace=namespace):
        await asyncio.Event().wait()


def main(url: str, namespace: str, phase: Phase) -> None:
    crash_on_marked_tasks(phase)
    shorten_ack_wait()
    while True:
        child = os.fork()
        if not child:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            asyncio.run(serve(url, namespace, phase))
        os.waitpid(child, 0)
        print("died", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]  # the test passes a phase
