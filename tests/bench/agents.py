"""The agents of a benchmark's world as nodes: an answer for a success; for a failure an error, or an empty answer.

The environment names the world and the agents: LEARNING_WORLD is `{"seed": …, "agents": […], "setting": {…}}`.
"""

import json
import os
from functools import partial

from bench.learning import Setting, World
from loom.schemas.run import RunRequest
from loom.types import AgentNode, CapabilityProfile

given = json.loads(os.environ["LEARNING_WORLD"])
world = World(given["seed"], Setting(**given["setting"]))


async def work(agent: int, job: RunRequest) -> str:
    """Do as the dice decide: every other failure is an error, the rest are silent."""
    number = int(job.task_id.removeprefix("t"))
    if world.score(number, agent):
        return f"task {number} done"
    if number % 2:
        raise RuntimeError("the dice are against it")
    return ""


def node(agent: int) -> AgentNode:
    claims = {f"d{domain}": world.claim(agent) for domain in range(len(world.specialists))}
    return AgentNode(id=str(agent), capabilities=CapabilityProfile(scores=claims), agent=partial(work, agent))


nodes = [node(agent) for agent in given["agents"]]
