"""The agent, by the import path of loom-agent 0.6."""

from loom.agents.llm.agent import Agent

__all__ = ["Agent"]
