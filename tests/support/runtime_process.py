"""A Runtime in a process of its own: hosts one node until its standard input closes.

Arguments: the node's name. Prints `ready`, and on end a JSON object of task id -> runs.
"""

import asyncio
import json
import sys
from collections import Counter

from loom import Runtime
from loom.schemas.run import RunRequest
from loom.types import CapabilityProfile

runs: Counter[str] = Counter()


async def work(job: RunRequest) -> str:
    runs[job.task_id] += 1
    await asyncio.sleep(0.01)
    return f"done by {sys.argv[1]}"


async def main() -> None:
    rt = Runtime()
    rt.add_agent(work, name=sys.argv[1], capabilities=CapabilityProfile(scores={"code": 0.9}))
    async with rt:
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)
    print(json.dumps(runs), flush=True)


asyncio.run(main())
