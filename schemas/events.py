"""What happens while an agent works, as one tagged union: the same from the agent to the client."""

from typing import Annotated, ClassVar, Literal

from msgspec import Meta
from msgspec.structs import force_setattr

from loom.schemas.auction import AWARD_BIDS, Merit, ScoredBid
from loom.schemas.base import CheckedMessage, Count, FreeJson, Name, Names, Number, Ordinal, Text, Timestamp, Unit
from loom.schemas.envelope import Phase
from loom.schemas.tokens import Token

Milliseconds = Annotated[int, Meta(ge=-(10**12), le=10**12)] | Number
"""A duration, whole or not."""


class TextDelta(CheckedMessage, frozen=True, kw_only=True, tag="text_delta"):
    """A piece of the answer."""

    type: ClassVar[str] = "text_delta"
    text: Text = ""


class ReasoningDelta(CheckedMessage, frozen=True, kw_only=True, tag="reasoning_delta"):
    """A piece of the model's reasoning, where it shows any."""

    type: ClassVar[str] = "reasoning_delta"
    text: Text = ""


class ToolCallStart(CheckedMessage, frozen=True, kw_only=True, tag="tool_call_start"):
    """A tool is about to run."""

    type: ClassVar[str] = "tool_call_start"
    tool_call_id: Text
    name: Text
    input: FreeJson = {}


class ToolCallEnd(CheckedMessage, frozen=True, kw_only=True, tag="tool_call_end"):
    """A tool has run; `result` is what the model gets to see, at most 2,000 characters here."""

    type: ClassVar[str] = "tool_call_end"
    tool_call_id: Text
    name: Text = ""
    result: Text = ""
    failed: bool = False
    duration_ms: Milliseconds = 0
    """Rounded to whole milliseconds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        force_setattr(self, "duration_ms", round(self.duration_ms))


class StepStart(CheckedMessage, frozen=True, kw_only=True, tag="step_start"):
    """A round of the agent begins; `step` counts from 1."""

    type: ClassVar[str] = "step_start"
    step: Count
    total_steps: Count = 0
    """The most rounds there may be."""


class StepEnd(CheckedMessage, frozen=True, kw_only=True, tag="step_end"):
    """A round of the agent ends."""

    type: ClassVar[str] = "step_end"
    step: Count
    reason: Literal["tool_use", "complete", "max_steps", "abort"] = "complete"


class ErrorEvent(CheckedMessage, frozen=True, kw_only=True, tag="error"):
    """The work failed; `code` is an error code of `loom.schemas.errors`."""

    type: ClassVar[str] = "error"
    error: Text
    code: Text = ""
    recoverable: bool = False


class TokenUsage(CheckedMessage, frozen=True, kw_only=True):
    """Tokens the whole work took."""

    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    total_tokens: Count = 0
    estimated_cost: Number = 0.0
    """US dollars, as far as the agent reports them."""
    estimated: bool = False
    """Whether tokens were guessed from text lengths because the model did not say."""


class Done(CheckedMessage, frozen=True, kw_only=True, tag="done"):
    """The work is over; always the last event."""

    type: ClassVar[str] = "done"
    content: Text = ""
    tokens_used: Count = 0
    steps: Count = 0
    duration_ms: Milliseconds = 0
    usage: TokenUsage = TokenUsage()


class SubtaskEvent(CheckedMessage, frozen=True, kw_only=True, tag="subtask"):
    """A subtask of a divided task has begun or ended. SCALE publishes it; it may be lost, or come twice."""

    type: ClassVar[str] = "subtask"
    parent_id: Token
    """The divided task."""
    child_id: Token
    """The task that the subtask is."""
    subtask: Token
    """Its id within the plan."""
    state: Literal["begun", "ended"]
    child_state: Literal["succeeded", "failed", "cancelled"] | None = None
    """How it has ended; absent while it runs."""
    description: Text = ""
    """At most 1 KiB of it."""
    node_id: Name | None = None
    """That of its result; absent while it runs."""
    owner: Name | None = None
    """Whose node that is."""
    error: Name = ""
    """Code of the error for which it did not succeed."""
    at: Timestamp
    """When it began or ended, in server time."""


class PhaseEvent(CheckedMessage, frozen=True, kw_only=True, tag="phase"):
    """A phase has passed a task on, and what it decided; a loop reports it, from the task's record.

    Which of the fields are set depends on `name`. After a failed attempt the phases of the next one are reported again.
    """

    type: ClassVar[str] = "phase"
    name: Phase
    attempt: Ordinal = 1
    """The attempt the phase worked for."""
    duration_ms: Milliseconds = 0
    """Time the phase had the task in hand; 0 for `adapt`."""
    complexity: Unit | None = None
    """sense: 0 trivial to 1 very hard."""
    domain: Name = ""
    """sense: the domain of the auction, as worded."""
    domains: Names = ()
    """sense: all domains found, best first."""
    method: Name = ""
    """sense: `given`, `heuristic` or `llm`."""
    node_id: Name | None = None
    """match: the winner; execute, evaluate, adapt: the node that had the task."""
    owner: Name | None = None
    """Whose node that is."""
    score: Merit | None = None
    """match: the winning bid's score; evaluate: the judge's score of the result, 0 to 1."""
    bids: Annotated[tuple[ScoredBid, ...], Meta(max_length=AWARD_BIDS)] = ()
    """match: the best bids with their parts, best first; empty for a pinned task."""
    subtasks: Count = 0
    """scale: parts the task was divided into so far."""
    tokens: Count = 0
    """execute: prompt and completion tokens of the attempt."""
    reward: Unit | None = None
    """evaluate: .5 quality + .3 efficiency + .2 reliability of the attempt, 0 for a failed one."""
    success_rate: Unit | None = None
    """adapt: the node's share of successes, this task included."""
    total_tasks: Count = 0
    """adapt: tasks the node has been rewarded for, this one included."""
    error: Name = ""
    """execute, evaluate: the code of the attempt's failure; empty for a success."""


Progress = TextDelta | ReasoningDelta | ToolCallStart | ToolCallEnd | StepStart | StepEnd
"""What an agent may say on its way."""
AgentEvent = Progress | ErrorEvent | Done
"""What an agent says."""
LoopEvent = AgentEvent | SubtaskEvent | PhaseEvent
"""What a loop says of a task."""
