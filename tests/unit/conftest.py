from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.agents import MakeAgent
from support.openai_server import OpenAIServer

from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig
from loom.agents.llm.openai.openai_provider import OpenAIProvider


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    async with OpenAIServer() as running:
        yield running


@pytest.fixture
async def make(server: OpenAIServer) -> AsyncIterator[MakeAgent]:
    provider = OpenAIProvider(AgentConfig(api_key="k", base_url=server.base_url))

    def build(*tools: Any, **config: Any) -> Agent:
        return Agent(provider, AgentConfig(**config), tools=tools)

    yield build
    await provider.aclose()
