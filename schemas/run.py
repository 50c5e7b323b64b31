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
"""Delegated tasks a run may have open at a time."""


class Delegated(Message, frozen=True, kw_only=True):
    """The id under which EXECUTE has published delegated work."""

    call: Count
    """Which delegation of the attempt it is, as its `waiting` had it."""
    task_id: Token


class RunRequest(Message, frozen=True, kw_only=True):
    """Run this task on that node. Idempotent by (task_id, attempt)."""

    task_id: Token
    attempt: Ordinal = field(default_factory=lambda: 1)  # a plain default would not be written
    node_id: Name = ""
    domain: Name = ""
    """As the ad or SENSE worded it."""
    description: Text
    complexity: Unit = 0.5
    context: FreeJson = {}
    inputs: Outputs = {}
    """subtask id -> output, for a task that others prepared."""
    accept: Accept | None = None
    """What the answer must be to count as a success."""
    tools: Names = ()
    """Tools the run may use; empty: all the node has. A host narrows it further."""
    tools_allowed: Names | None = None
    """The ad's list: no other tool may be used, whatever `tools` holds; absent: no restriction; empty: no tools."""
    token_budget: Count | None = None
    """Tokens left; a hard limit. Absent: none."""
    remaining_s: Seconds = 300.0
    priority: Priority = "normal"
    depth: Count = 0
    """0 for what a client submitted, one more for each division or delegation."""
    from_seq: Count = 0
    """Number of the first event wanted: more than 0 when re-attaching to a run."""
    delegated: Annotated[tuple[Delegated, ...], Meta(max_length=1000)] = ()
    """Ids of delegated work: those of `answers`, and those of what has just been published."""
    answers: Annotated[tuple[TaskResult, ...], Meta(max_length=1000)] = ()
    """How delegated work ended, for a run that waits for it; at most 64 KiB of content in all. Prompt tokens include
    all that failed attempts took."""
    trace: Note = ""
    deadline: Timestamp | None = None
    """The task's, in server time. A host begins no run after it."""
    sent_at: Timestamp | None = None
    """Server time of this sending. A host begins no run for a request that has waited for too long."""

    @property
    def key(self) -> str:
        """What tools may use to recognise a repeated effect."""
        return f"{self.task_id}:{self.attempt}"

    def allows(self, tool: str) -> bool:
        """Return whether the run may use the tool of that name, if its node has it.

        Example:
            >>> def answer(job: RunRequest) -> str:
            ...     return search(job.description) if job.allows("search") else guess(job.description)
        """
        return (not self.tools or tool in self.tools) and (self.tools_allowed is None or tool in self.tools_allowed)

    @property
    def messages(self) -> tuple[ChatMessage, ...]:
        """The conversation as turns, oldest first: those of `context["conversation"]`, then the description."""
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
"""No event follows one of these."""


class RunEvent(Message, frozen=True, kw_only=True):
    """One event of a run, numbered from 0."""

    seq: Count
    kind: RunKind
    queued: Count = 0
    """accepted: runs before this one."""
    code: Literal["busy", "unqualified", ""] = ""
    """rejected: why."""
    event: Progress | None = None
    """delta (text, steps) and tool_call: what happened."""
    ad: TaskAd | None = None
    """waiting: the work delegated, without an id; its `token_budget` is the most it may take."""
    call: Count = 0
    """waiting: which delegation of this attempt it is, from 1; the id is `delegated_id` of it."""
    task_id: Token | None = None
    """resumed: the delegated task nobody waits for any more, answered or not."""
    result: RunResult | None = None
    """result: what was produced; error: what had been written and spent by then, where the agent knows."""
    error: TaskError | None = None

    @property
    def final(self) -> bool:
        """Whether no event follows."""
        return self.kind in FINAL_KINDS


class Stop(Message, frozen=True, kw_only=True):
    """End this attempt's run: its result is not wanted any more. Repeated until the run's last event."""

    task_id: Token
    attempt: Ordinal
    why: Name = ""
    """cancelled, silent, late, flooded, forged, superseded or ended."""


def encode_event(event: RunEvent) -> bytes:
    """Return an event as JSON; the ad of a `waiting` has no id, because EXECUTE derives it."""
    if event.ad is None:
        return encode(event)
    tree = decode(encode(event), dict[str, Any])
    del tree["ad"]["task_id"]
    return encode(tree)


def delegated_id(task_id: str, attempt: int, call: int) -> str:
    """Return the id of the `call`-th task an attempt delegates: 26 letters and digits, the same wherever computed."""
    digest = blake2b(f"{task_id}:{attempt}:{call}".encode(), digest_size=16).digest()
    return b32encode(digest).decode().rstrip("=").lower()


def read_events(raw: bytes, discard: Callable[[str], None] = lambda _: None) -> tuple[RunEvent, ...]:
    """Return what one message on a run's event subject holds: an event, or several in a JSON array, oldest first.

    Content that is no string is taken as its JSON text. What still cannot be read takes no other event with it: a
    `result`, an `error`, a `rejected`, or content without a kind is the end of the run all the same, as `agent_failed`
    with the reason; anything else that is JSON is a sign of life and no more, a heartbeat.

    Args:
        raw: At most 512 KiB for each event.
        discard: Called with the reason for each event that cannot be read.

    Raises:
        Undecodable: It is not JSON, or too long to be looked at.
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
"""Longest message that is looked at to find out what it was to be; as much as a whole run may send."""
MAX_EVENTS = 10_000
"""Most parts of a message that are read one by one."""
MAX_UNREADABLE = 100
"""Parts of a message that cannot be read, after which the rest is not looked at."""


class _Outline(Message, frozen=True, kw_only=True):
    """What is read of an event that cannot be read: each field by itself."""

    seq: Raw = Raw(b"0")
    kind: Raw = Raw(b"null")
    content: Raw = Raw(b"null")


_Events: Any = RunEvent | tuple[RunEvent, ...]
_Outlines: Any = _Outline | Annotated[tuple[Raw, ...], Meta(max_length=MAX_EVENTS)] | str | int | float | bool | None


def _with_texts(value: Any) -> Any:
    """The events with the content of their results as text."""
    for event in value if isinstance(value, list) else [value]:
        result = event.get("result") if isinstance(event, dict) else None
        if isinstance(result, dict) and not isinstance(result.get("content"), str | None):
            result["content"] = encode(result["content"]).decode()
    return value


def _each(parts: Iterable[Raw], discard: Callable[[str], None]) -> Iterator[RunEvent]:
    """The events of an array that cannot be read as a whole."""
    reasons: list[str] = []
    for part in parts:
        yield _event(bytes(part), reasons.append)
        if len(reasons) == MAX_UNREADABLE:
            reasons.append(f"{MAX_UNREADABLE} events of one message cannot be read; the rest is not looked at")
            break
    for reason in reasons:
        discard(reason)


def _event(raw: bytes, discard: Callable[[str], None]) -> RunEvent:
    """One event of several."""
    try:
        return decode(raw, RunEvent, mend=_with_texts)
    except Undecodable as error:
        return _in_place(decode(raw, _Outlines, limit=MAX_OUTLINE_BYTES), error.message, discard)


def _in_place(outline: Any, reason: str, discard: Callable[[str], None]) -> RunEvent:
    """Return what stands for an event that cannot be read, and why."""
    discard(reason)
    if not isinstance(outline, _Outline):
        return RunEvent(seq=0, kind="heartbeat")
    seq, kind = _lenient(outline.seq, Count, 0), _lenient(outline.kind, Name, "")
    if kind in ("result", "error", "rejected") or (not kind and bytes(outline.content) != b"null"):
        why = cut_note(f"the last event of the run cannot be read: {reason}")
        return RunEvent(seq=seq, kind="error", error=TaskError(code="agent_failed", message=why))
    return RunEvent(seq=seq, kind="heartbeat")


def _lenient(raw: Raw, shape: Any, otherwise: Any) -> Any:
    try:
        return decode(bytes(raw), shape)
    except Undecodable:
        return otherwise


class Delta(Message, frozen=True, kw_only=True, omit_defaults=False):
    """One step of progress as clients see it."""

    task_id: Token
    attempt: Count
    seq: Count
    """The number of the run's event: each is greater than the one before, and heartbeats leave gaps."""
    at: Count = 0
    """Characters (Unicode code points) of text before it in this attempt: more than a reader has received means that
    the reader has missed some."""
    event: Progress
