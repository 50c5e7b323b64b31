"""LoopContext of loom-agent 0.6: a conversation as input of an AmoebaLoop."""

from dataclasses import dataclass, field
from typing import Any

from loom.schemas.errors import InvalidTask
from loom.schemas.llm import Message
from loom.schemas.task import TaskAd


@dataclass
class LoopContext:
    """A conversation as input of an AmoebaLoop.

    Args:
        messages: The last user message is the task; earlier turns are its context.
        domain: Domain of the task; empty: SENSE chooses it.
        timeout_s: Seconds until the deadline of the task.
        token_budget: A hard limit of tokens; None: no limit.

    Further fields are accepted without effect: the agents that bid have models, tools and limits. A task whose
    iteration ends early is cancelled.
    """

    messages: list[Message] = field(default_factory=list)
    domain: str = ""
    timeout_s: float = 300.0
    token_budget: int | None = None

    provider: Any = field(default=None, kw_only=True, repr=False)
    tools: Any = field(default=None, kw_only=True, repr=False)
    tool_registry: Any = field(default=None, kw_only=True, repr=False)
    tool_config: Any = field(default=None, kw_only=True, repr=False)
    tool_context: Any = field(default=None, kw_only=True, repr=False)
    max_steps: int | None = field(default=None, kw_only=True)
    streaming: bool | None = field(default=None, kw_only=True)
    temperature: float | None = field(default=None, kw_only=True)
    max_tokens: int | None = field(default=None, kw_only=True)
    session_id: str | None = field(default=None, kw_only=True)
    tenant_id: str | None = field(default=None, kw_only=True)
    agent_id: str | None = field(default=None, kw_only=True)
    interceptors: Any = field(default=None, kw_only=True, repr=False)
    events: Any = field(default=None, kw_only=True, repr=False)
    signal: Any = field(default=None, kw_only=True, repr=False)

    def to_ad(self) -> TaskAd:
        """Return the task.

        Raises:
            InvalidTask: No message of a user.
        """
        asked = [index for index, message in enumerate(self.messages) if message.role == "user"]
        if not asked:
            raise InvalidTask("no user message: describe the work", field="messages")
        earlier = [
            {"role": message.role, "content": message.content}
            for message in self.messages[: asked[-1]]
            if message.content
        ]
        return TaskAd(
            domain=self.domain,
            description=self.messages[asked[-1]].content,
            context={"conversation": earlier} if earlier else {},
            timeout_s=self.timeout_s,
            token_budget=self.token_budget,
        )
