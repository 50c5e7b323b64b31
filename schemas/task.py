"""What a client asks for, and what it gets back."""

from hashlib import blake2b
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from loom.schemas.base import (
    CheckedMessage,
    Count,
    FreeJson,
    Message,
    Name,
    Note,
    Seconds,
    Text,
    Unit,
    cut_name,
    cut_note,
    encode,
    new_id,
    total,
)
from loom.schemas.checks.constructor_errors import FieldsByName
from loom.schemas.checks.labels import LABELS_RULE, Labels
from loom.schemas.errors import InvalidTask, LoomError, TaskFailed, error_for
from loom.schemas.identity import LOCAL_OWNER, qualified
from loom.schemas.llm import Usage
from loom.schemas.tokens import NodeName, Token

Priority = Literal["low", "normal", "high", "critical"]
PRIORITIES: tuple[Priority, ...] = ("low", "normal", "high", "critical")
"""Least urgent first."""

DEFAULT_TOKEN_YARDSTICK = 4096
"""Tokens against which efficiency is measured when an ad sets no budget (the seed's default)."""

MAX_WARNINGS = 8
MAX_DOLLARS = 1e9
Dollars = Annotated[float, Meta(ge=0, le=MAX_DOLLARS)]
ToolName = Annotated[str, Meta(min_length=1, max_length=64)]


class Accept(CheckedMessage, metaclass=FieldsByName, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a result must be to count as a success."""

    contains: Annotated[tuple[Annotated[str, Meta(max_length=1000)], ...], Meta(max_length=16)] = ()
    """Texts the content must hold, letter for letter."""
    pattern: Annotated[str, Meta(min_length=1, max_length=1000)] | None = None
    """A regular expression that must be found in the content."""
    json_schema: FreeJson | None = None
    """The content must be JSON that fits this schema, which holds all it refers to."""
    rubric: Annotated[str, Meta(min_length=1, max_length=2000)] | None = None
    """What a model judges the content by, where the phases may ask one."""
    threshold: Unit = 0.5
    """Least score of that model; below it the task goes to another node."""
    best_effort: bool = False
    """Whether the best refused answer is taken when attempts, bidders or time run out; otherwise the task fails."""


class Limits(CheckedMessage, metaclass=FieldsByName, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Narrower bounds than the cluster's; a wider one is ignored."""

    max_depth: Annotated[int, Meta(ge=0, le=16)] | None = None
    mitosis_threshold: Unit | None = None


class TaskAd(CheckedMessage, metaclass=FieldsByName, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An advertisement for work: what is to be done, and under which limits."""

    task_id: Token = msgspec.field(default_factory=new_id)
    domain: Annotated[str, Meta(max_length=128)] = ""
    """Field of knowledge, any text; empty: SENSE decides."""
    description: Text = ""
    """The work, in words. At least one visible character."""
    estimated_complexity: Unit | None = None
    """0 trivial to 1 very hard; absent: SENSE decides."""
    priority: Priority = "normal"
    required_tools: Annotated[tuple[ToolName, ...], Meta(max_length=32)] = ()
    tools_allowed: Annotated[tuple[ToolName, ...], Meta(max_length=256)] | None = None
    """The only tools a run may use, of those its node has; absent: all of them; empty: none. Subtasks and delegated
    tasks inherit the list and can only narrow it."""
    token_budget: Annotated[int, Meta(ge=1, le=100_000_000)] | None = None
    """A hard limit of tokens; absent: no limit, and 4096 as yardstick of efficiency."""
    timeout_s: Annotated[float, Meta(gt=0, le=86_400)] = 300.0
    """Seconds from acceptance to the deadline."""
    node_id: NodeName | None = None
    """Pin: only this node may run it; no auction. `node_id`, or `owner.node_id` where the owner is not `local`."""
    accept: Accept | None = None
    limits: Limits | None = None
    context: FreeJson = {}
    """Small free JSON handed to the agent."""
    labels: Labels = {}
    """Pairs of strings for gateways, tenants and people, at most 16 and 2 KiB of JSON in all. The record, the result
    and rewards have them, subtasks and delegated tasks inherit them, and no agent gets to see them."""
    wait: bool = True
    """False: `loom.submit` answers at once with `accepted`."""

    def _out_of_range(self, name: str, ge: float, le: float) -> ValueError:
        """Return the error that a client in another language would get."""
        error = super()._out_of_range(name, ge, le)
        return InvalidTask(f"{name} must be {FIELD_RULES[name]}", field=name) if name in FIELD_RULES else error


FIELD_RULES = {
    "task_id": "1 to 64 letters, digits, _ or -",
    "node_id": "NODE or OWNER.NODE, each 1 to 64 letters, digits, _ or -",
    "priority": f"one of {', '.join(PRIORITIES)}",
    "timeout_s": "a number of seconds, more than 0 and at most 86400",
    "token_budget": "a whole number of tokens, at least 1",
    "estimated_complexity": "a number from 0 to 1",
    "labels": LABELS_RULE,
    "required_tools": "a list of names, at most 32 of 1 to 64 characters",
    "context": 'a JSON object, such as {"file": "sales.csv"}',
    "accept": 'an object such as {"contains": ["total"]}',
    "limits": 'an object such as {"max_depth": 1}',
    "wait": "true or false",
}
"""field -> its rule in words, where msgspec's own are hard to read."""


def ad_digest(ad: TaskAd) -> str:
    """Return 16 hex digits that tell an ad from others under the same id; whether it waits makes no difference.

    Args:
        ad: As it was read from JSON, or as `check_ad` has returned it: 300 and 300.0 are different digits.
    """
    return blake2b(encode(ad if ad.wait else replace(ad, wait=True)), digest_size=8).hexdigest()


class Submission(Message, frozen=True, kw_only=True):
    """An ad on its way into the loop."""

    ad: TaskAd
    submission: Token
    """Random per submit call: tells a resent message from a second submitter of the same id."""
    reply_to: Annotated[str, Meta(max_length=256)] = ""
    """Where the TaskResult is wanted; empty: nowhere."""


class BestRejected(CheckedMessage, frozen=True, kw_only=True):
    """The best answer that was refused, with the reason."""

    content: Text
    """At most 64 KiB of JSON."""
    truncated: bool = False
    """Whether the answer was longer and has been cut."""
    score: Unit = 0.0
    """The judge's; 0 where the answer broke a rule and was not judged."""
    reason: Note = ""
    """Why it was refused."""
    node_id: Name = ""
    """The node that gave it."""
    owner: Name = LOCAL_OWNER
    """Whose node it is."""

    @property
    def node(self) -> str:
        """The node as people write it."""
        return qualified(self.owner, self.node_id)


class TaskError(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a task, or one attempt at it, failed."""

    code: Annotated[str, Meta(max_length=64)]
    message: Note = ""
    field: Name | None = None
    node_id: Name | None = None
    retry_after_s: Seconds | None = None
    best_rejected: BestRejected | None = None
    """On a TaskResult's error: the best answer that was refused on the way, if there was one."""

    @classmethod
    def of(cls, error: LoomError, *, node_id: str | None = None) -> "TaskError":
        """Return the wire form of `error`."""
        return cls(
            code=error.code,
            message=cut_note(error.message),
            field=None if error.field is None else cut_name(error.field),
            node_id=node_id or error.node_id,
            retry_after_s=error.retry_after_s,
        )

    def to_exception(self, task_id: str) -> LoomError:
        """Return the exception that a Python caller gets; `partial` is the text of the best refused answer."""
        error = error_for(
            self.code,
            self.message,
            task_id=task_id,
            field=self.field,
            node_id=self.node_id,
            retry_after_s=self.retry_after_s,
        )
        best = self.best_rejected
        if best is not None and isinstance(error, TaskFailed):
            error.best_rejected, error.partial = best, best.content
        return error


class RunResult(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a node's agent produced in one attempt."""

    content: Text = ""
    """The answer, at most 64 KiB of JSON."""
    truncated: bool = False
    """Whether the answer was longer and has been cut."""
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    estimated_usage: bool = False
    """Whether tokens were guessed from text lengths because the model did not say."""
    steps: Count = 0
    """Rounds the agent took."""
    tool_errors: Count = 0
    duration_s: Seconds = 0.0
    usd: Dollars = 0.0
    """What the run has cost, as far as its agent reports it."""

    @property
    def tokens_used(self) -> int:
        """The same as `tokens`."""
        return self.tokens

    @property
    def usage(self) -> Usage:
        """Prompt and completion tokens."""
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens)

    @property
    def duration_ms(self) -> int:
        """`duration_s` in whole milliseconds."""
        return round(self.duration_s * 1000)

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens together."""
        return total(self.prompt_tokens, self.completion_tokens)

    def usage_with(self, other: "RunResult") -> "RunResult":
        """Return the tokens and the money of both, and nothing else of either."""
        return RunResult(
            prompt_tokens=total(self.prompt_tokens, other.prompt_tokens),
            completion_tokens=total(self.completion_tokens, other.completion_tokens),
            estimated_usage=self.estimated_usage or other.estimated_usage,
            usd=min(MAX_DOLLARS, self.usd + other.usd),
        )


class PhaseUsage(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one phase has asked a model on behalf of a task."""

    requests: Count = 0
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    estimated: bool = False
    """Whether tokens were guessed from text lengths because the model did not report them."""

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens together."""
        return total(self.prompt_tokens, self.completion_tokens)

    def plus(self, other: "PhaseUsage") -> "PhaseUsage":
        """Return the sum of both."""
        return PhaseUsage(
            requests=total(self.requests, other.requests),
            prompt_tokens=total(self.prompt_tokens, other.prompt_tokens),
            completion_tokens=total(self.completion_tokens, other.completion_tokens),
            estimated=self.estimated or other.estimated,
        )


class TaskUsage(CheckedMessage, frozen=True, kw_only=True):
    """What a task has taken besides its runs."""

    phases: Annotated[dict[Name, PhaseUsage], Meta(max_length=16)] = {}
    """phase -> what its questions to a model took; absent: the phase asked none."""

    def __hash__(self) -> int:
        """Return a hash, so that results with a dictionary in them may be members of a set."""
        return hash(frozenset(self.phases.items()))


TaskState = Literal["accepted", "running", "succeeded", "failed", "cancelled"]


class TaskResult(Message, frozen=True, kw_only=True):
    """The one answer to a task."""

    task_id: Token
    state: TaskState
    content: Text = ""
    error: TaskError | None = None
    domain: Name = ""
    node_id: Name | None = None
    owner: Name | None = None
    """Whose node it is."""
    host_id: Name | None = None
    attempts: Count = 0
    score: Unit | None = None
    """What the judge gave the result."""
    below_threshold: bool = False
    """Whether a success is only the best answer there was, short of what `accept` asks, as `best_effort` allows."""
    truncated: bool = False
    prompt_tokens: Count = 0
    """Of all attempts, failed ones included, with all that subtasks and delegated tasks took; what the phases asked
    a model on behalf of the task itself is in `usage`."""
    completion_tokens: Count = 0
    estimated_usage: bool = False
    """Whether tokens were guessed from text lengths because a model did not report them."""
    usd: Dollars = 0.0
    """What all attempts have cost, as far as their agents report it."""
    usage: TaskUsage = TaskUsage()
    steps: Count = 0
    duration_s: Seconds = 0.0
    """Seconds the winning run took."""
    warnings: Annotated[tuple[Note, ...], Meta(max_length=MAX_WARNINGS)] = ()
    """What a person should know of the result, such as a judge that could not be asked."""
    labels: Labels = {}
    """The ad's."""
    ad_digest: Annotated[str, Meta(max_length=64)] = ""
    """Of the ad as it was submitted: another one under the same id has another digest. Empty: the ad is not known."""

    def __hash__(self) -> int:
        """Return a hash, so that results may be members of a set with the dictionary of labels in them."""
        return hash((self.task_id, self.state, self.content, self.attempts))

    @property
    def success(self) -> bool:
        """Whether the task succeeded."""
        return self.state == "succeeded"

    @property
    def node(self) -> str:
        """The node as people write it: `owner.node_id` where the owner is not `local`; empty where there is none."""
        return qualified(self.owner or LOCAL_OWNER, self.node_id) if self.node_id else ""


class Accepted(CheckedMessage, frozen=True, kw_only=True, omit_defaults=False):
    """The answer to a submit that does not wait."""

    task_id: Token
    state: Literal["accepted"] = "accepted"


class ErrorReply(CheckedMessage, frozen=True, kw_only=True):
    """The body of the reply to a request that is refused; whatever concerns a task that exists is a TaskResult."""

    code: Name
    message: Note
    field: Name | None = None


class StatusQuery(Message, frozen=True, kw_only=True):
    """What a request for the status of a task, or for its cancel, may have as its body."""

    full: bool | None = None
    """Whether the record is wanted, too."""
