"""An agent that yields as many pieces as the task's context asks for, without a pause; for `loom host run`."""

from collections.abc import AsyncIterator

from bench.deltas import piece
from loom.schemas.run import RunRequest
from loom.types import AgentNode, CapabilityProfile


async def talk(job: RunRequest) -> AsyncIterator[str]:
    for number in range(job.context["pieces"]):
        yield piece(number)


nodes = [AgentNode(id="talker", capabilities=CapabilityProfile(scores={"talk": 0.7}), agent=talk)]
