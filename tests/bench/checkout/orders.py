"""The orders of a benchmark to a submitter's process, as lines of JSON on standard input and output.

An order is `{"tasks": …, "in_flight": …}`; its outcome is `{"times_s": […], "failures": {code: tasks}}`.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping


async def serve_orders(carry: Callable[[int, int], Awaitable[Mapping[str, object]]]) -> None:
    """Call `carry` with the tasks and the number in flight of each order, until standard input is closed."""
    loop = asyncio.get_running_loop()
    print("ready", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        print(json.dumps(await carry(order["tasks"], order["in_flight"])), flush=True)
