"""What happens while an agent works, as one tagged union: the same from the agent to the client."""

from typing import ClassVar, Literal

from loom.schemas.wire import Count, FreeJson, Name, Number, Text, Token, Wire


class TextDelta(Wire, frozen=True, kw_only=True, tag="text_delta"):
    """A piece of the answer."""

    type: ClassVar[str] = "text_delta"
    text: Text = ""


class ReasoningDelta(Wire, frozen=True, kw_only=True, tag="reasoning_delta"):
    """A piece of the model's reasoning, where it shows any."""

    type: ClassVar[str] = "reasoning_delta"
    text: Text = ""


class ToolCallStart(Wire, frozen=True, kw_only=True, tag="tool_call_start"):
    """A tool is about to run."""

    type: ClassVar[str] = "tool_call_start"
    tool_call_id: Text
    name: Text
    input: FreeJson = {}


class ToolCallEnd(Wire, frozen=True, kw_only=True, tag="tool_call_end"):
    """A tool has run; `result` is what the model gets to see, at most 2,000 characters here."""

    type: ClassVar[str] = "tool_call_end"
    tool_call_id: Text
    name: Text = ""
    result: Text = ""
    failed: bool = False
    duration_ms: Number = 0.0


class StepStart(Wire, frozen=True, kw_only=True, tag="step_start"):
    """A round of the agent begins; `step` counts from 1."""

    type: ClassVar[str] = "step_start"
    step: Count
    total_steps: Count = 0
    """The most rounds there may be."""


class StepEnd(Wire, frozen=True, kw_only=True, tag="step_end"):
    """A round of the agent ends."""

    type: ClassVar[str] = "step_end"
    step: Count
    reason: Literal["tool_use", "complete", "max_steps", "abort"] = "complete"


class ErrorEvent(Wire, frozen=True, kw_only=True, tag="error"):
    """The work failed; `code` is an error code of `loom.schemas.errors`."""

    type: ClassVar[str] = "error"
    error: Text
    code: Text = ""
    recoverable: bool = False


class TokenUsage(Wire, frozen=True, kw_only=True):
    """Tokens the whole work took."""

    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    total_tokens: Count = 0
    estimated_cost: Number = 0.0
    """US dollars, as far as the agent reports them."""
    estimated: bool = False
    """Whether tokens were guessed from text lengths because the model did not say."""


class Done(Wire, frozen=True, kw_only=True, tag="done"):
    """The work is over; always the last event."""

    type: ClassVar[str] = "done"
    content: Text = ""
    tokens_used: Count = 0
    steps: Count = 0
    duration_ms: Number = 0.0
    usage: TokenUsage = TokenUsage()


class SubtaskEvent(Wire, frozen=True, kw_only=True, tag="subtask"):
    """A part of a divided task has begun or ended; no agent says this, a loop does."""

    type: ClassVar[str] = "subtask"
    id: Token
    """Within the plan."""
    task_id: Token
    """Its own task."""
    state: Literal["running", "succeeded", "failed", "cancelled"]
    description: Text = ""
    node_id: Name | None = None
    """Who has done it; absent while it runs."""
    error: Name = ""
    """Code of why it did not succeed."""


Progress = TextDelta | ReasoningDelta | ToolCallStart | ToolCallEnd | StepStart | StepEnd
"""What an agent may say on its way."""
AgentEvent = Progress | ErrorEvent | Done
"""What an agent says."""
LoopEvent = AgentEvent | SubtaskEvent
"""What a loop says of a task."""
