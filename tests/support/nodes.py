"""Nodes for tests: small, and each with a behaviour of its own."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from loom.schemas.run import RunRequest
from loom.types import AgentNode, CapabilityProfile


def node(name: str, agent: Callable[..., Any], **claims: float) -> AgentNode:
    """A node of that name; `code=0.9` claims a domain."""
    return AgentNode(id=name, capabilities=CapabilityProfile(scores=dict(claims)), agent=agent)


async def echo(job: RunRequest) -> str:
    return f"done: {job.description}"


async def fail(job: RunRequest) -> str:
    raise RuntimeError(f"cannot do {job.description}")


class Counting:
    """An agent that counts how often each task was run."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.runs: Counter[str] = Counter()
        self._seconds = seconds

    async def __call__(self, job: RunRequest) -> str:
        self.runs[job.task_id] += 1
        await asyncio.sleep(self._seconds)
        return f"done: {job.description}"
