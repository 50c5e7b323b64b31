"""The submitter of a checkout: reads orders as lines of JSON, and prints the outcome of each.

An order is `{"tasks": …, "in_flight": …}`; its outcome is `{"times_s": […], "failures": {code: tasks}}`.
"""

import asyncio
import json
import os
import sys
from collections import Counter

from bench.checkout.event_loop import run
from bench.checkout.loom_names import Bus, TaskAd, configure_logs, publish
from bench.measure import closed_loop

FILLER_BYTES = 600
"""Bytes of a task's description."""
TASK_TIMEOUT_S = 300.0
RESULT_TIMEOUT_S = 240.0


class Submitter:
    """Submits tasks and waits for their results, with a constant number in flight."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._failures: Counter[str] = Counter()

    async def carry(self, tasks: int, in_flight: int) -> dict[str, object]:
        """Return the time of each task, in seconds, and the number of failed tasks by the code of their error."""
        self._failures.clear()
        times_s = await closed_loop(self._submit, tasks, in_flight)
        return {"times_s": times_s, "failures": self._failures}

    async def _submit(self) -> None:
        ad = TaskAd(domain="code", description="x" * FILLER_BYTES, estimated_complexity=0.3, timeout_s=TASK_TIMEOUT_S)
        handle = await publish(self._bus, ad, deltas=False)
        result = await handle.result(RESULT_TIMEOUT_S)
        if not result.success:
            self._failures[result.error.code if result.error else result.state] += 1


async def serve_orders() -> None:
    """Carry out the orders of standard input until it is closed."""
    loop = asyncio.get_running_loop()
    async with Bus(os.environ["NATS_URL"], namespace=os.environ["LOOM_NAMESPACE"], role="client") as bus:
        submitter = Submitter(bus)
        print("ready", flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            order = json.loads(line)
            outcome = await submitter.carry(order["tasks"], order["in_flight"])
            print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    configure_logs("error")
    run(serve_orders())
