"""Events of a run as one tagged union, the same in the agent, on the wire and at the client."""

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
    """A piece of the model's reasoning, if its server sends any."""

    type: ClassVar[str] = "reasoning_delta"
    text: Text = ""


class ToolCallStart(CheckedMessage, frozen=True, kw_only=True, tag="tool_call_start"):
    """A tool is about to run."""

    type: ClassVar[str] = "tool_call_start"
    tool_call_id: Text
    name: Text
    input: FreeJson = {}


class ToolCallEnd(CheckedMessage, frozen=True, kw_only=True, tag="tool_call_end"):
    """A tool has run; `result` is the text that the model receives, cut to 2,000 characters."""

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
    """Most rounds of the agent."""


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
    """Tokens and cost of the whole run."""

    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    total_tokens: Count = 0
    estimated_cost: Number = 0.0
    """US dollars, if the agent reports them."""
    estimated: bool = False
    """Whether tokens were estimated from text lengths because the model did not report them."""


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
    """State of the ended task; absent while it runs."""
    description: Text = ""
    """The first 1 KiB."""
    node_id: Name | None = None
    """Node of its result; absent while it runs."""
    owner: Name | None = None
    """Owner of the node."""
    error: Name = ""
    """Code of its error; empty for a success."""
    at: Timestamp
    """When it began or ended, in server time."""


class PhaseEvent(CheckedMessage, frozen=True, kw_only=True, tag="phase"):
    """A phase has decided and passed a task on; `AmoebaLoop` derives it from the task's record.

    The set fields depend on `name`. After a failed attempt, the phases of the next attempt are reported again.
    """

    type: ClassVar[str] = "phase"
    name: Phase
    attempt: Ordinal = 1
    """Number of the attempt, from 1."""
    duration_ms: Milliseconds = 0
    """Time from receipt to publication by the phase; 0 for `adapt`."""
    complexity: Unit | None = None
    """sense: 0 trivial to 1 very hard."""
    domain: Name = ""
    """sense: the domain of the auction."""
    domains: Names = ()
    """sense: all domains found, best first."""
    method: Name = ""
    """sense: `given`, `heuristic` or `llm`."""
    node_id: Name | None = None
    """match: the winner; execute, evaluate, adapt: the node of the attempt."""
    owner: Name | None = None
    """Owner of the node."""
    score: Merit | None = None
    """match: the winning bid's score; evaluate: the judge's score of the result, 0 to 1."""
    bids: Annotated[tuple[ScoredBid, ...], Meta(max_length=AWARD_BIDS)] = ()
    """match: the best bids with the terms of their scores, best first; empty for a pinned task."""
    subtasks: Count = 0
    """scale: subtasks so far."""
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
"""Events of a run before its end."""
AgentEvent = Progress | ErrorEvent | Done
"""All events of an agent."""
LoopEvent = AgentEvent | SubtaskEvent | PhaseEvent
"""All events of `AmoebaLoop.execute`."""
