"""Model providers, by the import path of loom-agent 0.6."""

from loom.agents.llm.openai.openai_provider import OpenAIProvider

__all__ = ["OpenAIProvider"]
