"""Agents that burden their host, except the first; TEST_NODE_ID selects one."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator

from loom.types import AgentNode, CapabilityProfile

BLOCK_S = float(os.environ.get("BLOCK_S", "40"))


async def honest(description: str) -> str:
    """Answer at once."""
    return f"done: {description}"


async def echo(description: str) -> str:
    """Return the description, which a check of the answer then reads."""
    return description


async def interrupts(description: str) -> str:
    """Raise what a Ctrl-C in a library raises."""
    raise KeyboardInterrupt(description)


async def blocks(description: str) -> str:
    """Hold the event loop of the host."""
    time.sleep(BLOCK_S)  # noqa: ASYNC251 - this mistake is what the test is about
    return f"late: {description}"


async def uncancellable(description: str) -> str:
    """Swallow every cancellation."""
    while True:
        with contextlib.suppress(BaseException):
            await asyncio.sleep(1)


async def endless(description: str) -> AsyncIterator[str]:
    """Yield text without an end."""
    while True:
        yield f"{description} again and again " * 40


KINDS = {agent.__name__: agent for agent in (honest, echo, interrupts, blocks, uncancellable, endless)}
KIND = os.environ["TEST_NODE_ID"].partition("-")[0]

nodes = [
    AgentNode(
        id=os.environ["TEST_NODE_ID"],
        capabilities=CapabilityProfile(scores={"code": 0.8}, tools=[KIND]),
        agent=KINDS[KIND],
    )
]
