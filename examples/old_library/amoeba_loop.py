"""Runs a conversation through the six phases, with the imports and calls of loom-agent 0.6.

The answers come from a model: set OPENAI_API_KEY, or OPENAI_BASE_URL for another server.

    python examples/old_library/amoeba_loop.py
"""

import asyncio

from loom import ClusterManager, LifecycleManager, RewardBus
from loom.agent import Agent
from loom.agent.strategy import LoopContext
from loom.cluster.amoeba_loop import AmoebaLoop
from loom.cluster.planner import TaskPlanner
from loom.cluster.skill_registry import SkillNodeRegistry
from loom.config import AgentConfig, ClusterConfig
from loom.events import DoneEvent, EventBus, TextDeltaEvent
from loom.providers.openai import OpenAIProvider
from loom.types import AgentNode, CapabilityProfile, Skill, UserMessage


def context_of(provider: OpenAIProvider) -> LoopContext:
    return LoopContext(
        messages=[UserMessage(content="Write a Python function that sorts a list, and a test for the code.")],
        provider=provider,
        tools=[],
        tool_registry=None,
        tool_config=None,
        tool_context={},
        max_steps=3,
        streaming=True,
        temperature=0.7,
        max_tokens=1024,
        session_id="session",
        tenant_id="tenant",
        agent_id="amoeba",
        interceptors=None,
        events=None,
        signal=None,
    )


async def main() -> None:
    config = AgentConfig(system_prompt="You are brief.", stream=True)
    provider = OpenAIProvider(config)
    steps: list[str] = []
    bus = EventBus()
    bus.on_pattern("step:*", lambda event: steps.append(event.type))
    coder = Agent(provider, config, "coder", event_bus=bus)
    coder.on("done", lambda event: steps.append(event.type))

    cluster = ClusterManager(ClusterConfig(max_depth=3))
    for name, agent, scores in (
        ("coder", coder, {"code": 0.9}),
        ("analyst", Agent(provider=provider, config=config), {"data": 0.8}),
    ):
        cluster.add_node(AgentNode(id=name, capabilities=CapabilityProfile(scores=scores), agent=agent))
    skills = SkillNodeRegistry()
    skills.register(Skill(name="poet", description="Writes poems.", trigger={"keywords": ["poem"]}))  # type: ignore[arg-type]
    loop = AmoebaLoop(
        cluster=cluster,
        reward_bus=RewardBus(),
        lifecycle=LifecycleManager(cluster.config),
        planner=TaskPlanner(provider),
        skill_registry=skills,
        llm=provider,
    )
    async for event in loop.execute(context_of(provider)):
        if isinstance(event, TextDeltaEvent):
            print(event.text, end="")
        elif event.type == "phase":
            print(f"[{event.name}] {event.node_id or event.domain}")
        elif isinstance(event, DoneEvent):
            print(f"done: steps={event.steps}, whole milliseconds: {isinstance(event.duration_ms, int)}")
    print("handlers:", ", ".join(steps))


asyncio.run(main())
