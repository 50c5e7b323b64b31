"""Agents that do nothing, for `loom host run`: BENCH_NODES names them, separated by commas."""

import os

from loom.types import AgentNode, CapabilityProfile


async def work(description: str) -> str:
    return "done"


def node(name: str) -> AgentNode:
    return AgentNode(id=name, capabilities=CapabilityProfile(scores={"code": 0.7}), agent=work)


nodes = [node(name) for name in os.environ["BENCH_NODES"].split(",")]
