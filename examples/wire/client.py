"""A client that uses only nats-py: `python client.py [URL] DESCRIPTION`. Ctrl-C cancels the task.

In the account of a submitter (see docs/tasks.md), the same subjects reach only the tasks of that submitter.
"""

import asyncio
import json
import os
import signal
import sys
import uuid

import nats


async def main(url: str, description: str) -> int:
    """Submit a task, print its text as it arrives, and return 0 if the task succeeded."""
    nc = await nats.connect(url)
    task = uuid.uuid4().hex

    async def show(msg: nats.aio.msg.Msg) -> None:
        delta = json.loads(msg.data)
        print(delta["event"].get("text", ""), end="", flush=True)

    await nc.subscribe(f"loom.delta.public.{task}", cb=show)
    cancel = lambda: asyncio.ensure_future(nc.request(f"loom.cancel.{task}", timeout=5))
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, cancel)
    ad = {"task_id": task, "description": description, "timeout_s": 300}
    answer = await nc.request("loom.submit", json.dumps(ad).encode(), timeout=310)
    result = json.loads(answer.data)
    print("\n" + json.dumps(result))
    await nc.drain()
    return 0 if result.get("state") == "succeeded" else 1


if __name__ == "__main__":
    *given, words = sys.argv[1:]
    sys.exit(asyncio.run(main(given[0] if given else os.environ.get("NATS_URL", "nats://127.0.0.1:4222"), words)))
