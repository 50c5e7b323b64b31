"""The messages between EXECUTE and a node host about one run."""

from base64 import b32encode
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, field

from loom.schemas.base import (
    Count,
    FreeJson,
    Message,
    Name,
    Names,
    Note,
    Ordinal,
    Outputs,
    Seconds,
    Text,
    Timestamp,
    Undecodable,
    Unit,
    cut_note,
    decode,
    encode,
)
from loom.schemas.decoding.conversation import earlier_turns
from loom.schemas.events import Progress
from loom.schemas.llm import Message as ChatMessage
from loom.schemas.task import Accept, Priority, RunResult, TaskAd, TaskError, TaskResult
from loom.schemas.tokens import Token

MAX_OPEN_DELEGATIONS = 64
"""Most delegated tasks that a run may wait for at once."""


class Delegated(Message, frozen=True, kw_only=True):
    """The id of a delegated task that EXECUTE has published."""

    call: Count
    """Number of the delegation within the attempt, as in its `waiting` event."""
    task_id: Token


class RunRequest(Message, frozen=True, kw_only=True):
    """A request to run a task on a node. Idempotent by (task_id, attempt)."""

    task_id: Token
    attempt: Ordinal = field(default_factory=lambda: 1)  # a plain default would be omitted in JSON
    node_id: Name = ""
    domain: Name = ""
    """In the wording of the ad or of SENSE."""
    description: Text
    complexity: Unit = 0.5
    context: FreeJson = {}
    inputs: Outputs = {}
    """subtask id -> output, for a synthesis or a subtask with dependencies."""
    accept: Accept | None = None
    """Rules that the answer must meet."""
    tools: Names = ()
    """Tools that the run may use; empty: all tools of the node. A host may narrow it further."""
    tools_allowed: Names | None = None
    """List of the ad: no other tool may be used, even if it is in `tools`; absent: no restriction; empty: no tools."""
    token_budget: Count | None = None
    """Tokens left; a hard limit. Absent: none."""
    remaining_s: Seconds = 300.0
    priority: Priority = "normal"
    depth: Count = 0
    """0 for a task of a client, one more for each division or delegation."""
    from_seq: Count = 0
    """Number of the first requested event: more than 0 to reattach to a run."""
    delegated: Annotated[tuple[Delegated, ...], Meta(max_length=1000)] = ()
    """Ids of delegated tasks: of those in `answers`, and of those just published."""
    answers: Annotated[tuple[TaskResult, ...], Meta(max_length=1000)] = ()
    """Results of delegated tasks for which the run waits, with at most 64 KiB of content in total. Prompt tokens
    include those of failed attempts."""
    trace: Note = ""
    deadline: Timestamp | None = None
    """Deadline of the task in server time. A host starts no run after it."""
    sent_at: Timestamp | None = None
    """Server time of publication. A host starts no run for a request that is too old."""

    @property
    def key(self) -> str:
        """Key by which tools recognise a repeated effect: `task:attempt`."""
        return f"{self.task_id}:{self.attempt}"

    def allows(self, tool: str) -> bool:
        """Return whether the run may use a tool, provided that its node has it.

        Example:
            >>> def answer(job: RunRequest) -> str:
            ...     return search(job.description) if job.allows("search") else guess(job.description)
        """
        return (not self.tools or tool in self.tools) and (self.tools_allowed is None or tool in self.tools_allowed)

    @property
    def messages(self) -> tuple[ChatMessage, ...]:
        """Turns of the conversation, oldest first: those of `context["conversation"]`, then the description."""
        return (*earlier_turns(self.context), ChatMessage(role="user", content=self.description))


RunKind = Literal[
    "accepted",
    "rejected",
    "started",
    "delta",
    "tool_call",
    "heartbeat",
    "waiting",
    "resumed",
    "moved",
    "result",
    "error",
]
FINAL_KINDS: frozenset[str] = frozenset({"rejected", "moved", "result", "error"})
"""Kinds of events that end a run."""


class RunEvent(Message, frozen=True, kw_only=True):
    """One event of a run, numbered from 0."""

    seq: Count
    kind: RunKind
    queued: Count = 0
    """accepted: runs in the queue before this one."""
    code: Literal["busy", "unqualified", ""] = ""
    """rejected: why."""
    event: Progress | None = None
    """delta (text, steps) and tool_call: the event of the agent."""
    ad: TaskAd | None = None
    """waiting: the delegated task, without an id; its `token_budget` is its token limit."""
    call: Count = 0
    """waiting: number of the delegation within the attempt, from 1; `delegated_id` derives the id from it."""
    task_id: Token | None = None
    """resumed: the delegated task for which the run no longer waits, with or without a result."""
    result: RunResult | None = None
    """result: the outcome; error: text and tokens before the error, if the agent reports them."""
    error: TaskError | None = None

    @property
    def final(self) -> bool:
        """Whether no event follows."""
        return self.kind in FINAL_KINDS


class Stop(Message, frozen=True, kw_only=True):
    """A request to end a run whose result is not needed any more. Published again until the last event of the run."""

    task_id: Token
    attempt: Ordinal
    why: Name = ""
    """cancelled, silent, late, flooded, forged, superseded or ended."""


def encode_event(event: RunEvent) -> bytes:
    """Return an event as JSON, without the id of its ad, because EXECUTE derives it."""
    if event.ad is None:
        return encode(event)
    tree = decode(encode(event), dict[str, Any])
    del tree["ad"]["task_id"]
    return encode(tree)


def delegated_id(task_id: str, attempt: int, call: int) -> str:
    """Return the id of the `call`-th delegated task of an attempt: 26 lower-case letters and digits, a digest."""
    digest = blake2b(f"{task_id}:{attempt}:{call}".encode(), digest_size=16).digest()
    return b32encode(digest).decode().rstrip("=").lower()


def read_events(raw: bytes, discard: Callable[[str], None] = lambda _: None) -> tuple[RunEvent, ...]:
    """Return the events of one message: a single event, or a JSON array of events, oldest first.

    Content that is not a string becomes its JSON text. An event that cannot be decoded does not affect the others. If
    it is a `result`, an `error`, a `rejected` or has content without a kind, it ends the run as `agent_failed` with the
    reason. Any other JSON counts as a heartbeat.

    Args:
        raw: JSON, at most 512 KiB for each event.
        discard: Called with the reason for each event that cannot be decoded.

    Raises:
        Undecodable: It is not JSON, or longer than 16 MiB.
    """
    try:
        read: RunEvent | tuple[RunEvent, ...] = decode(raw, _Events, mend=_with_texts)
    except Undecodable as error:
        outline = decode(raw, _Outlines, limit=MAX_OUTLINE_BYTES)
        if isinstance(outline, tuple):
            return tuple(_each(outline, discard))
        return (_in_place(outline, error.message, discard),)
    return read if isinstance(read, tuple) else (read,)


MAX_OUTLINE_BYTES = 16 * 2**20
"""Longest message whose parts are decoded one by one; a whole run may publish as much."""
MAX_EVENTS = 10_000
"""Most events of one message that are decoded one by one."""
MAX_UNREADABLE = 100
"""Undecodable events of a message after which the rest is ignored."""


class _Outline(Message, frozen=True, kw_only=True):
    """The fields of an undecodable event, each decoded separately."""

    seq: Raw = Raw(b"0")
    kind: Raw = Raw(b"null")
    content: Raw = Raw(b"null")


_Events: Any = RunEvent | tuple[RunEvent, ...]
_Outlines: Any = _Outline | Annotated[tuple[Raw, ...], Meta(max_length=MAX_EVENTS)] | str | int | float | bool | None


def _with_texts(value: Any) -> Any:
    """Return the events with the content of their results as text."""
    for event in value if isinstance(value, list) else [value]:
        result = event.get("result") if isinstance(event, dict) else None
        if isinstance(result, dict) and not isinstance(result.get("content"), str | None):
            result["content"] = encode(result["content"]).decode()
    return value


def _each(parts: Iterable[Raw], discard: Callable[[str], None]) -> Iterator[RunEvent]:
    """Yield the events of an array that cannot be decoded as a whole."""
    reasons: list[str] = []
    for part in parts:
        yield _event(bytes(part), reasons.append)
        if len(reasons) == MAX_UNREADABLE:
            reasons.append(f"{MAX_UNREADABLE} events of one message cannot be decoded; the rest is ignored")
            break
    for reason in reasons:
        discard(reason)


def _event(raw: bytes, discard: Callable[[str], None]) -> RunEvent:
    """Return one event of an array."""
    try:
        return decode(raw, RunEvent, mend=_with_texts)
    except Undecodable as error:
        return _in_place(decode(raw, _Outlines, limit=MAX_OUTLINE_BYTES), error.message, discard)


def _in_place(outline: Any, reason: str, discard: Callable[[str], None]) -> RunEvent:
    """Return the replacement of an undecodable event."""
    discard(reason)
    if not isinstance(outline, _Outline):
        return RunEvent(seq=0, kind="heartbeat")
    seq, kind = _lenient(outline.seq, Count, 0), _lenient(outline.kind, Name, "")
    if kind in ("result", "error", "rejected") or (not kind and bytes(outline.content) != b"null"):
        why = cut_note(f"the last event of the run cannot be decoded: {reason}")
        return RunEvent(seq=seq, kind="error", error=TaskError(code="agent_failed", message=why))
    return RunEvent(seq=seq, kind="heartbeat")


def _lenient(raw: Raw, shape: Any, otherwise: Any) -> Any:
    try:
        return decode(bytes(raw), shape)
    except Undecodable:
        return otherwise


class Delta(Message, frozen=True, kw_only=True, omit_defaults=False):
    """One step of progress, as clients receive it."""

    task_id: Token
    attempt: Count
    seq: Count
    """Number of the run's event, increasing; heartbeats leave gaps."""
    at: Count = 0
    """Characters (Unicode code points) of text before it in this attempt; more than received: there is a gap."""
    event: Progress
