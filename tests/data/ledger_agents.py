"""Agents that write down each run, in a file that survives them."""

import asyncio
import hashlib
import os
from pathlib import Path

from loom import delegate
from loom.schemas.run import RunRequest
from loom.types import AgentNode, CapabilityProfile

RUNS = Path(os.environ["LEDGER_RUNS"])
LONGEST_S = 0.2


async def work(job: RunRequest) -> str:
    """Take a while that depends on the task, unless there is nothing to do, and answer what the ledger expects."""
    with RUNS.open("a") as runs:
        runs.write(f"{job.task_id} {job.attempt}\n")
    if job.description.startswith("delegate"):
        await delegate(f"errand of {job.task_id}", domain="code")
    elif job.description != "nothing":
        await asyncio.sleep(hashlib.blake2b(job.task_id.encode(), digest_size=1).digest()[0] / 255 * LONGEST_S)
    return f"done: {job.description}"


nodes = [AgentNode(id=os.environ["LEDGER_NODE"], capabilities=CapabilityProfile(scores={"code": 0.8}), agent=work)]
