"""How an agent and its model are set up: the seed's names and defaults."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Settings of an agent and of the model it asks; its repr shows no secret.

    Raises:
        ValueError: A limit is below 1.
    """

    provider: str = "openai"
    model: str = "gpt-4o-mini"
    system_prompt: str = ""
    max_steps: int = 10
    """Most rounds with the model for one job."""
    temperature: float = 0.7
    max_tokens: int = 4096
    """Most tokens of one answer."""
    token_budget: int = 128_000
    """Most tokens one conversation may grow to."""
    stream: bool = True
    api_key: str | None = field(default=None, repr=False)
    """Absent: `OPENAI_API_KEY`."""
    base_url: str | None = None
    """Absent: `OPENAI_BASE_URL`, else OpenAI's own."""
    tool_context: dict[str, Any] = field(default_factory=dict, repr=False)
    """Handed to tools that ask for a ToolContext."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_tokens", "token_budget"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
