"""What EXECUTE and a node host say to each other about one run."""

from base64 import b32encode
from collections.abc import Iterable, Iterator
from contextlib import suppress
from hashlib import blake2b
from typing import Annotated, Any, Literal

from msgspec import Meta, Raw

from loom.schemas.events import Progress
from loom.schemas.task import Priority, RunResult, TaskAd, TaskError, TaskResult
from loom.schemas.wire import Count, Relayed, Seconds, Token, Undecodable, Unit, decode

MAX_OPEN_DELEGATIONS = 64
"""Delegated tasks a run may have open at a time."""
REQUEST_VALID_S = 4.0
"""Age beyond which a host begins nothing on a request: EXECUTE repeats each second what it still wants."""


class RunRequest(Relayed, frozen=True, kw_only=True):
    """Run this task on that node. Idempotent by (task_id, attempt)."""

    task_id: Token
    attempt: Annotated[int, Meta(ge=1)] = 1
    node_id: str = ""
    domain: str = ""
    """As the ad or SENSE worded it."""
    description: str
    complexity: Unit = 0.5
    context: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    """subtask id -> output, for a task that others prepared."""
    tools: tuple[str, ...] = ()
    """Tools the run may use; empty: all the node has. A host narrows it further."""
    token_budget: int | None = None
    """Tokens left; a hard limit. Absent: none."""
    remaining_s: Seconds = 300.0
    deadline: float | None = None
    """The task's, in server time; absent: `remaining_s` counts from when the request is read."""
    sent_at: float | None = None
    """Server time of this sending of the request; absent: unknown."""
    priority: Priority = "normal"
    depth: Count = 0
    """0 for what a client submitted, one more for each division or delegation."""
    from_n: Count = 0
    """Number of the first event wanted: more than 0 when re-attaching to a run."""
    answers: tuple[TaskResult, ...] = ()
    """How delegated work ended, for a run that waits for it; at most 64 KiB of content in all. Prompt tokens include
    all that failed attempts took."""
    trace: str = ""

    @property
    def key(self) -> str:
        """What tools may use to recognise a repeated effect."""
        return f"{self.task_id}:{self.attempt}"


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


class RunEvent(Relayed, frozen=True, kw_only=True):
    """One event of a run, numbered from 0."""

    n: Count
    kind: RunKind
    queued: Count = 0
    """accepted: runs before this one."""
    code: Literal["busy", "cannot", ""] = ""
    """rejected: why."""
    event: Progress | None = None
    """delta (text, steps) and tool_call: what happened."""
    ad: TaskAd | None = None
    """waiting: the work delegated; its `token_budget` is the most it may take."""
    call: Count = 0
    """waiting: which delegation of this attempt it is, from 1; the ad's id is `delegated_id` of it."""
    task_id: Token | None = None
    """resumed: the delegated task nobody waits for any more, answered or not."""
    result: RunResult | None = None
    """result: what was produced; error: what had been written and spent by then, where the agent knows."""
    error: TaskError | None = None

    @property
    def final(self) -> bool:
        """Whether no event follows."""
        return self.kind in FINAL_KINDS


def delegated_id(task_id: str, attempt: int, call: int) -> str:
    """Return the id of the `call`-th task an attempt delegates: 26 letters and digits, the same wherever computed."""
    digest = blake2b(f"{task_id}:{attempt}:{call}".encode(), digest_size=16).digest()
    return b32encode(digest).decode().rstrip("=").lower()


def read_events(raw: bytes) -> tuple[RunEvent, ...]:
    """Return what one message on a run's inbox tells: an event, or several in a JSON array, oldest first.

    What is no event in an array is left out: an agent's slip must not take the run's result with it.

    Raises:
        Undecodable: No event can be read.
    """
    if not raw.startswith(b"["):
        return (decode(raw, RunEvent),)
    try:
        return decode(raw, tuple[RunEvent, ...])
    except Undecodable:
        events = tuple(_readable(decode(raw, tuple[Raw, ...])))
        if not events:
            raise
        return events


def _readable(parts: Iterable[Raw]) -> Iterator[RunEvent]:
    for part in parts:
        with suppress(Undecodable):
            yield decode(bytes(part), RunEvent)


class Delta(Relayed, frozen=True, kw_only=True):
    """One step of progress as clients see it."""

    task_id: Token
    attempt: Count
    n: Count
    event: Progress
