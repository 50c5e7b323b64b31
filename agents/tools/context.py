"""The context of a tool call, and its result for the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ToolContext:
    """The job and the call of a tool; passed to a parameter that is annotated with this class."""

    task_id: str
    attempt: int
    remaining_s: float
    """Seconds that the job has left when the tool starts."""
    call: int = 1
    """Number of the call within the attempt, from 1, in the order of the model."""
    call_id: str = ""
    """Id of the call in the conversation with the model."""
    tool_context: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The `tool_context` of the agent's config."""

    @property
    def key(self) -> str:
        """`task:attempt:call`, an idempotency key for side effects.

        Each call of an attempt has a different key, even if the arguments are equal. An attempt that is run again
        counts from 1 again, so that the same calls have the same keys.
        """
        return f"{self.task_id}:{self.attempt}:{self.call}"


@dataclass(frozen=True)
class ToolResult:
    """The result of a call for the model. A tool may return one to report a failure without raising."""

    text: str
    failed: bool = False
    published: str | None = None
    """Text for the bus instead, such as the type of an exception; default: `text`."""
