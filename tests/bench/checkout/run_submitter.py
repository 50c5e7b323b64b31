"""The submitter of a checkout; it carries out orders."""

import os
from collections import Counter

from bench.checkout.event_loop import run
from bench.checkout.loom_names import Bus, TaskAd, configure_logs, publish
from bench.checkout.orders import serve_orders
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


async def submit_on_order() -> None:
    """Connect, and carry out the orders of standard input."""
    async with Bus(os.environ["NATS_URL"], namespace=os.environ["LOOM_NAMESPACE"], role="client") as bus:
        await serve_orders(Submitter(bus).carry)


if __name__ == "__main__":
    configure_logs("error")
    run(submit_on_order())
