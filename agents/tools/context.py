"""What a tool gets to know of its call, and what it returns to the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ToolContext:
    """The job and the call a tool runs for; a parameter annotated with this class receives it."""

    task_id: str
    attempt: int
    remaining_s: float
    """Seconds the job has left as the tool starts."""
    call: int = 1
    """Number of the call among all calls of the attempt, in the order in which the model made them."""
    call_id: str = ""
    """Id of the call in the conversation, as the model's server knows it."""
    tool_context: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """As in the agent's config."""

    @property
    def key(self) -> str:
        """`task:attempt:call`, for the idempotency of an effect.

        Two calls of an attempt never share a key, also if they are equal and in one round. An attempt that is run
        again counts from 1 again, so that a model that makes the same calls repeats their keys.
        """
        return f"{self.task_id}:{self.attempt}:{self.call}"


@dataclass(frozen=True)
class ToolResult:
    """What a model gets to see of a call. A tool may return one, to report a failure without raising."""

    text: str
    failed: bool = False
    published: str | None = None
    """What the bus gets instead: of an exception its type alone. Absent: the text."""
