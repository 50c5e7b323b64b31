"""Settings, by the import path of loom-agent 0.6."""

from loom.agents.llm.config import AgentConfig
from loom.schemas.config import ClusterConfig

__all__ = ["AgentConfig", "ClusterConfig"]
