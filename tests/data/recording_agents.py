"""Agents that append each run to a file."""

import asyncio
import hashlib
import os
from pathlib import Path

from loom import delegate
from loom.schemas.run import RunRequest
from loom.types import AgentNode, CapabilityProfile

RUNS = Path(os.environ["TEST_RUNS_FILE"])
LONGEST_S = 0.2


async def work(job: RunRequest) -> str:
    """Work for a time derived from the task id, or delegate, or return at once, as the description asks."""
    with RUNS.open("a") as runs:
        runs.write(f"{job.task_id} {job.attempt}\n")
    if job.description.startswith("delegate"):
        await delegate(f"errand of {job.task_id}", domain="code")
    elif job.description != "nothing":
        await asyncio.sleep(hashlib.blake2b(job.task_id.encode(), digest_size=1).digest()[0] / 255 * LONGEST_S)
    return f"done: {job.description}"


nodes = [AgentNode(id=os.environ["TEST_NODE_ID"], capabilities=CapabilityProfile(scores={"code": 0.8}), agent=work)]
