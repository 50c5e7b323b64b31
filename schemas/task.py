"""What a client asks for, and what it gets back."""

import re
import unicodedata
from functools import lru_cache
from hashlib import blake2b, sha256
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from loom.schemas.base import (
    MAX_AD_BYTES,
    MAX_CONTEXT_BYTES,
    MAX_JSON_DEPTH,
    MAX_SCHEMA_BYTES,
    CheckedMessage,
    Count,
    FreeJson,
    Message,
    Name,
    NodeName,
    Note,
    Seconds,
    Text,
    Token,
    Undecodable,
    Unit,
    cut_name,
    cut_note,
    decode,
    encode,
    free_json_fault,
    new_id,
    total,
)
from loom.schemas.checks.constructor_errors import FieldsByName
from loom.schemas.checks.labels import LABELS_RULE, Labels, are_labels
from loom.schemas.errors import InvalidTask, LoomError, error_for
from loom.schemas.identity import LOCAL_OWNER, qualified
from loom.schemas.llm import Usage
from loom.schemas.rejected import BestRejected, facts_of
from loom.schemas.text.nearest_name import unknown_field

Priority = Literal["low", "normal", "high", "critical"]
PRIORITIES: tuple[Priority, ...] = ("low", "normal", "high", "critical")
"""Least urgent first."""

DEFAULT_TOKEN_YARDSTICK = 4096
"""Tokens against which efficiency is measured when an ad sets no budget (the seed's default)."""

TOKEN_PATTERN = r"[A-Za-z0-9_-]{1,64}"  # noqa: S105 - not a secret
_TOKEN = re.compile(TOKEN_PATTERN)
MAX_TOKEN = 64
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
        return InvalidTask(f"{name} must be {_RULES[name]}", field=name) if name in _RULES else error


class _StrictAccept(Accept, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Accept as a client submits it."""


class _StrictLimits(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits as a client submits them."""


class _StrictAd(TaskAd, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TaskAd as a client submits it: a misspelt field is an error, not a silent default."""

    accept: _StrictAccept | None = None
    limits: _StrictLimits | None = None


def parse_ad(raw: bytes) -> TaskAd:
    """Return the ad a client submitted as JSON.

    Raises:
        InvalidTask: With `field` naming the part, where one is to blame.
    """
    if len(raw) > MAX_AD_BYTES:
        raise _too_large(len(raw))
    try:
        ad = decode(raw, _StrictAd, keep_unknown=False)
    except Undecodable as error:
        raise _refusal(raw, error) from None
    return check_ad(ad)


def check_ad(ad: TaskAd) -> TaskAd:
    """Return `ad` as it will be read, if it may be submitted; Python callers construct ads unchecked.

    Raises:
        InvalidTask: With `field` naming the part.
    """
    if not isinstance(ad.accept, Accept | None):
        raise InvalidTask(f"accept must be {_RULES['accept']}", field="accept", task_id=ad.task_id)
    schema = ad.accept.json_schema if ad.accept else None
    for name, free, most in (("context", ad.context, MAX_CONTEXT_BYTES), ("accept", schema, MAX_SCHEMA_BYTES)):
        fault = free_json_fault(free, max_bytes=most)
        if fault:
            raise InvalidTask(f"{name} {fault}", field=name, task_id=ad.task_id)
    if not are_labels(ad.labels):
        raise InvalidTask(f"labels must be {LABELS_RULE}", field="labels", task_id=ad.task_id)
    try:
        raw = encode(ad)
        if len(raw) > MAX_AD_BYTES:
            raise _too_large(len(raw))
        checked = decode(raw, TaskAd)
    except Undecodable as error:
        refusal = _refusal(raw, error)
        raise InvalidTask(refusal.message, field=refusal.field, task_id=ad.task_id) from None
    except (UnicodeEncodeError, TypeError) as error:
        field = _field_in(str(error))
        raise InvalidTask(f"not a valid TaskAd: {error}", field=field, task_id=ad.task_id) from None
    if not checked.description.strip():
        raise InvalidTask("description is empty: say what is to be done", field="description", task_id=ad.task_id)
    forbidden = set(checked.required_tools).difference(checked.tools_allowed or ())
    if checked.tools_allowed is not None and forbidden:
        names = ", ".join(sorted(forbidden))
        message = f"required_tools has what tools_allowed lacks: {names}; add it there, or do not require it"
        raise InvalidTask(cut_note(message), field="required_tools", task_id=ad.task_id)
    return checked


_RULES = {
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


def _refusal(raw: bytes, error: Undecodable) -> InvalidTask:
    if not raw.strip():
        return InvalidTask("the ad is empty: send a JSON object with at least a description", field="description")
    if isinstance(error.__cause__, RecursionError):
        return InvalidTask(f"context is nested more than {MAX_JSON_DEPTH} levels deep", field="context")
    if isinstance(error.__cause__, UnicodeDecodeError):
        field = _field_not_utf8(raw)
        return InvalidTask(f"{field or 'the ad'} is not UTF-8", field=field)
    field = _field_in(error.message)
    unknown = _UNKNOWN.search(error.message)
    if unknown:
        return InvalidTask(f"unknown field `{unknown[1]}`; {unknown_field(*_place(unknown))}", field=unknown[1])
    if field in _RULES and error.message.endswith(f"`$.{field}`"):
        return InvalidTask(f"{field} must be {_RULES[field]}", field=field)
    return InvalidTask(f"not a valid TaskAd: {error.message}", field=field)


_UNKNOWN = re.compile(r"unknown field `([^`]*)`(?: - at `\$\.(\w+)`)?")


def _place(unknown: re.Match[str]) -> tuple[str, tuple[str, ...]]:
    """Return an unknown field, and the fields there are in its place."""
    shapes: dict[str | None, type[CheckedMessage]] = {"accept": Accept, "limits": Limits}
    return unknown[1], shapes.get(unknown[2], TaskAd).__struct_fields__


def _too_large(size: int) -> InvalidTask:
    return InvalidTask(
        f"the ad is {size} bytes, at most {MAX_AD_BYTES}: shorten description and context, or pass them by reference",
        field="description",
    )


def _field_not_utf8(raw: bytes) -> str | None:
    """The last key before the first byte that is not UTF-8."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        keys = re.findall(rb'"(\w+)"\s*:', raw[: error.start])
        return keys[-1].decode() if keys else None
    return None


def _field_in(message: str) -> str | None:
    """The field a msgspec message blames: `$.field` in a path, or the unknown one in backticks."""
    unknown = _UNKNOWN.search(message)
    if unknown:
        return unknown.group(1)
    path = re.search(r"`\$\.([A-Za-z_]\w*)", message)
    return path.group(1) if path else None


def ad_digest(ad: TaskAd) -> str:
    """Return 16 hex digits that tell an ad from others under the same id; whether it waits makes no difference.

    Args:
        ad: As it was read from JSON, or as `check_ad` has returned it: 300 and 300.0 are different digits.
    """
    return blake2b(encode(ad if ad.wait else replace(ad, wait=True)), digest_size=8).hexdigest()


def is_token(text: str) -> bool:
    """Return whether `text` may stand as one token of a subject."""
    return len(text) <= MAX_TOKEN and _is_token(text)


@lru_cache(maxsize=4096)
def _is_token(text: str) -> bool:
    return _TOKEN.fullmatch(text) is not None


@lru_cache(maxsize=1024)
def domain_token(domain: str) -> str:
    """Return the token a domain is addressed and indexed by, such as `code` for `Code` and `x-e6f04ffbaa42` for 代码.

    The text in Unicode's form NFC, trimmed and in lower case; where that cannot stand in a subject, `x-` and the first
    12 hex digits of the SHA-256 of its UTF-8 bytes. docs/subjects.md has examples for other implementations.
    """
    text = unicodedata.normalize("NFC", domain).strip().lower()
    if _TOKEN.fullmatch(text):
        return text
    return "x-" + sha256(text.encode(errors="replace")).hexdigest()[:12]


class Submission(Message, frozen=True, kw_only=True):
    """An ad on its way into the loop."""

    ad: TaskAd
    submission: Token
    """Random per submit call: tells a resent message from a second submitter of the same id."""
    reply_to: Annotated[str, Meta(max_length=256)] = ""
    """Where the TaskResult is wanted; empty: nowhere."""


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
        """Return the exception a Python caller gets; `partial` is the text of the best refused answer."""
        return error_for(
            self.code,
            self.message,
            task_id=task_id,
            field=self.field,
            node_id=self.node_id,
            retry_after_s=self.retry_after_s,
            **facts_of(self.best_rejected),
        )


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
