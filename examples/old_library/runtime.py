"""Opens a Runtime with nodes of a model and a skill, with the imports and calls of loom-agent 0.6.

The answers come from a model: set OPENAI_API_KEY, or OPENAI_BASE_URL for another server.

    python examples/old_library/runtime.py
"""

import asyncio

from loom import Runtime
from loom.config import AgentConfig, ClusterConfig
from loom.errors import AuctionNoWinnerError, LoomError
from loom.providers.openai import OpenAIProvider
from loom.types import CapabilityProfile, Skill, TaskAd


async def main() -> None:
    config = AgentConfig(system_prompt="You are brief.", max_steps=3)
    provider = OpenAIProvider(config)
    rt = Runtime(provider, config, ClusterConfig(idle_timeout=60, no_bids_after_s=1))
    rt.add_agent(capabilities=CapabilityProfile(scores={"code": 0.9}))
    rt.add_agent(capabilities=CapabilityProfile(scores={"data": 0.8}))
    translator = rt.load_skill(Skill(name="translation", description="Translates.", instructions="You translate."))
    print("nodes:", len(rt.cluster.nodes), "- idle:", rt.cluster.find_idle() is not None)

    print(await rt.submit(TaskAd(domain="code", description="Sort a list")))
    print(await rt.submit(TaskAd(domain="translation", description="Translate: hello", node_id=translator.id)))
    for report in rt.health_check():
        assert report.status == "healthy"
    try:
        await rt.submit(TaskAd(domain="data", description="Draw", required_tools=["pencil"]))
    except AuctionNoWinnerError as error:
        assert isinstance(error, LoomError)
        print("AuctionNoWinnerError:", error.code)
    rt.dispose()


asyncio.run(main())
