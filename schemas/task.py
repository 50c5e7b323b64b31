"""Tasks of clients and their results: ads, errors, results, replies."""

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
"""Token budget for the efficiency of tasks without one; the default of loom-agent 0.6."""

MAX_WARNINGS = 8
MAX_DOLLARS = 1e9
Dollars = Annotated[float, Meta(ge=0, le=MAX_DOLLARS)]
ToolName = Annotated[str, Meta(min_length=1, max_length=64)]


class Accept(CheckedMessage, metaclass=FieldsByName, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rules that a result must meet to count as a success."""

    contains: Annotated[tuple[Annotated[str, Meta(max_length=1000)], ...], Meta(max_length=16)] = ()
    """Texts that the content must contain exactly."""
    pattern: Annotated[str, Meta(min_length=1, max_length=1000)] | None = None
    """A regular expression that must match somewhere in the content."""
    json_schema: FreeJson | None = None
    """JSON Schema of the content; it must contain everything to which it refers."""
    rubric: Annotated[str, Meta(min_length=1, max_length=2000)] | None = None
    """Criteria for a model that judges the content, if EVALUATE has one."""
    threshold: Unit = 0.5
    """Least score of that model; with a lower one the task goes to another node."""
    best_effort: bool = False
    """Whether the best refused answer counts when attempts, bidders or time run out; otherwise the task fails."""


class Limits(CheckedMessage, metaclass=FieldsByName, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Narrower bounds than those of the cluster; wider ones are ignored."""

    max_depth: Annotated[int, Meta(ge=0, le=16)] | None = None
    mitosis_threshold: Unit | None = None


class TaskAd(CheckedMessage, metaclass=FieldsByName, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An advertisement for work: the description of a task and its limits."""

    task_id: Token = msgspec.field(default_factory=new_id)
    domain: Annotated[str, Meta(max_length=128)] = ""
    """Field of knowledge, any text; empty: SENSE chooses it."""
    description: Text = ""
    """The work, in words. At least one visible character."""
    estimated_complexity: Unit | None = None
    """0 trivial to 1 very hard; absent: SENSE estimates it."""
    priority: Priority = "normal"
    required_tools: Annotated[tuple[ToolName, ...], Meta(max_length=32)] = ()
    tools_allowed: Annotated[tuple[ToolName, ...], Meta(max_length=256)] | None = None
    """The only tools of its node that a run may use; absent: all of them; empty: none. Subtasks and delegated tasks
    inherit the list and can only narrow it."""
    token_budget: Annotated[int, Meta(ge=1, le=100_000_000)] | None = None
    """Hard limit of tokens; absent: no limit, and efficiency is measured against 4096."""
    timeout_s: Annotated[float, Meta(gt=0, le=86_400)] = 300.0
    """Seconds from acceptance to the deadline."""
    node_id: NodeName | None = None
    """Pin: only this node may run the task, without an auction. `node_id`, or `owner.node_id` if the owner is not
    `local`."""
    accept: Accept | None = None
    limits: Limits | None = None
    context: FreeJson = {}
    """Small JSON object for the agent."""
    labels: Labels = {}
    """Pairs of strings for gateways, tenants and people, at most 16 and 2 KiB of JSON in total. The record, the result
    and rewards have them, subtasks and delegated tasks inherit them, and agents do not receive them."""
    wait: bool = True
    """False: the reply of `loom.submit` is `accepted`, at once."""

    def _out_of_range(self, name: str, ge: float, le: float) -> ValueError:
        """Return the error that clients in other languages receive."""
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
"""field -> its rule in words, which are easier to read than those of msgspec."""


def ad_digest(ad: TaskAd) -> str:
    """Return 16 hex digits that distinguish an ad from others with the same id; `wait` has no effect on them.

    Args:
        ad: Decoded from JSON, or returned by `check_ad`: 300 and 300.0 have different digests.
    """
    return blake2b(encode(ad if ad.wait else replace(ad, wait=True)), digest_size=8).hexdigest()


class Submission(Message, frozen=True, kw_only=True):
    """An ad in the stream INTAKE."""

    ad: TaskAd
    submission: Token
    """Random per call of submit: distinguishes a repeated message from another submission of the same id."""
    reply_to: Annotated[str, Meta(max_length=256)] = ""
    """Subject for the TaskResult; empty: none."""


class BestRejected(CheckedMessage, frozen=True, kw_only=True):
    """The best refused answer of a task without an accepted one."""

    content: Text
    """The answer, at most 64 KiB of JSON."""
    truncated: bool = False
    """Whether the answer was longer and has been cut."""
    score: Unit = 0.0
    """Score by a model; 0 if the answer broke a rule and was not judged."""
    reason: Note = ""
    """Why it was refused."""
    node_id: Name = ""
    """Node of the answer."""
    owner: Name = LOCAL_OWNER
    """Owner of the node."""

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
    """In the error of a TaskResult: the best refused answer, if there was one."""

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
    """Outcome of one run: content, tokens and cost."""

    content: Text = ""
    """The answer, at most 64 KiB of JSON."""
    truncated: bool = False
    """Whether the answer was longer and has been cut."""
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    estimated_usage: bool = False
    """Whether tokens were estimated from text lengths because the model did not report them."""
    steps: Count = 0
    """Rounds of the agent."""
    tool_errors: Count = 0
    duration_s: Seconds = 0.0
    usd: Dollars = 0.0
    """Cost of the run in US dollars, if its agent reports it."""

    @property
    def tokens_used(self) -> int:
        """Equal to `tokens`."""
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
        """Return a result with the sum of both tokens and costs, and nothing else."""
        return RunResult(
            prompt_tokens=total(self.prompt_tokens, other.prompt_tokens),
            completion_tokens=total(self.completion_tokens, other.completion_tokens),
            estimated_usage=self.estimated_usage or other.estimated_usage,
            usd=min(MAX_DOLLARS, self.usd + other.usd),
        )


class PhaseUsage(CheckedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Model calls of one phase for a task."""

    requests: Count = 0
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    estimated: bool = False
    """Whether tokens were estimated from text lengths because the model did not report them."""

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
    """Tokens of a task in addition to those of its runs."""

    phases: Annotated[dict[Name, PhaseUsage], Meta(max_length=16)] = {}
    """phase -> tokens of its model calls; absent: it made none."""

    def __hash__(self) -> int:
        """Return a hash: sets may contain results, despite the dictionary in them."""
        return hash(frozenset(self.phases.items()))


TaskState = Literal["accepted", "running", "succeeded", "failed", "cancelled"]


class TaskResult(Message, frozen=True, kw_only=True):
    """The final result of a task."""

    task_id: Token
    state: TaskState
    content: Text = ""
    error: TaskError | None = None
    domain: Name = ""
    node_id: Name | None = None
    owner: Name | None = None
    """Owner of the node."""
    host_id: Name | None = None
    attempts: Count = 0
    score: Unit | None = None
    """Score of the result by a model."""
    below_threshold: bool = False
    """Whether a success is the best refused answer, which `best_effort` permits."""
    truncated: bool = False
    prompt_tokens: Count = 0
    """Total of all attempts, failed ones included, and of subtasks and delegated tasks. Model calls of the phases for
    the task itself are in `usage`."""
    completion_tokens: Count = 0
    estimated_usage: bool = False
    """Whether tokens were estimated from text lengths because a model did not report them."""
    usd: Dollars = 0.0
    """Cost of all attempts in US dollars, if their agents report it."""
    usage: TaskUsage = TaskUsage()
    steps: Count = 0
    duration_s: Seconds = 0.0
    """Duration of the winning run."""
    warnings: Annotated[tuple[Note, ...], Meta(max_length=MAX_WARNINGS)] = ()
    """Warnings about the result, such as a judging model that did not respond."""
    labels: Labels = {}
    """Labels of the ad."""
    ad_digest: Annotated[str, Meta(max_length=64)] = ""
    """Digest of the submitted ad: another ad with the same id has another one. Empty: the ad is unknown."""

    def __hash__(self) -> int:
        """Return a hash: sets may contain results, despite the dictionary of labels in them."""
        return hash((self.task_id, self.state, self.content, self.attempts))

    @property
    def success(self) -> bool:
        """Whether the task succeeded."""
        return self.state == "succeeded"

    @property
    def node(self) -> str:
        """The node as people write it: `owner.node_id` if the owner is not `local`; empty without a node."""
        return qualified(self.owner or LOCAL_OWNER, self.node_id) if self.node_id else ""


class Accepted(CheckedMessage, frozen=True, kw_only=True, omit_defaults=False):
    """The reply to a submission that does not wait."""

    task_id: Token
    state: Literal["accepted"] = "accepted"


class ErrorReply(CheckedMessage, frozen=True, kw_only=True):
    """The reply to a refused request; an error of an existing task comes as a TaskResult."""

    code: Name
    message: Note
    field: Name | None = None


class StatusQuery(Message, frozen=True, kw_only=True):
    """Optional body of a status or cancel request."""

    full: bool | None = None
    """Whether the reply includes the record."""
