"""What an agent is, and how its stream becomes one result."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, runtime_checkable

from loom.agents.deadline import Deadline
from loom.agents.user_code import Opened, described, ends_task, guarded, text_of, type_name
from loom.bus.log import get_logger
from loom.bus.redaction import redact
from loom.schemas.errors import AgentFailed, LoomError, error_for
from loom.schemas.events import AgentEvent, Done, ErrorEvent, Progress, TextDelta, ToolCallEnd
from loom.schemas.run import RunRequest
from loom.schemas.task import RunResult, TaskError
from loom.schemas.wire import MAX_CONTENT_BYTES, Undecodable, cut_utf8, decode, encode

log = get_logger()

Tell = Callable[[Progress], Awaitable[None]]

DELTA_CHARS = 4096
"""Most characters of one TextDelta cut from a text that came whole."""
MAX_TEXT_CHARS = 4 * 2**20
"""Characters of text beyond which a run counts as endless."""
MAX_EVENTS = 100_000
"""Events, or pieces of text, beyond which a run counts as endless."""
MAX_MESSAGE_CHARS = 2000
OWN_CODES = frozenset({"agent_failed", "budget_exceeded", "deadline_exceeded", "subtask_failed"})
"""What a run may say of itself, and of what it has delegated. Any other code would speak for the cluster."""
MOST_WAIT_S = 1e9
"""A wait beyond this, some thirty years, means nothing."""


@runtime_checkable
class StreamingAgent(Protocol):
    """Anything that works on a job: it yields progress and, last, one Done; it fails by raising a LoomError."""

    def stream(self, job: RunRequest) -> AsyncIterator[AgentEvent]:
        """Work on `job`."""
        ...


def deltas(text: str) -> tuple[TextDelta, ...]:
    """Return `text` in pieces, as far as a result may carry it."""
    if 0 < len(text) <= DELTA_CHARS:
        return (TextDelta(text=text),)
    starts = range(0, min(len(text), MAX_CONTENT_BYTES), DELTA_CHARS)
    return tuple(TextDelta(text=text[start : start + DELTA_CHARS]) for start in starts)


class Output:
    """How much an agent has put out; one without end is stopped."""

    def __init__(self) -> None:
        self._chars = 0
        self._events = 0

    def add(self, chars: int) -> None:
        """Count an event with so many characters of text.

        Raises:
            AgentFailed: It is more than any answer takes.
        """
        self._chars += chars
        self._events += 1
        if self._chars > MAX_TEXT_CHARS or self._events > MAX_EVENTS:
            limit = f"{MAX_TEXT_CHARS // 2**20} MiB of text or {MAX_EVENTS:,} events"
            raise AgentFailed(f"endless output: more than {limit}")


async def collect(agent: StreamingAgent, job: RunRequest, tell: Tell | None = None) -> RunResult:
    """Run `job` to its end and return the result.

    Args:
        tell: Called with all progress as it comes.

    Raises:
        LoomError: The agent failed; an ErrorEvent, an empty answer, none at all, an endless or a senseless one counts
            as failing. Of any other exception only the type is named; its text is logged.
        asyncio.CancelledError: This task is cancelled.
    """
    try:
        return await _collected(agent, job, tell)
    except LoomError:
        raise
    except BaseException as error:  # an agent is user code: whatever it raises is its failure
        if ends_task(error):
            raise
        raise raised(error, job) from error


async def _collected(agent: StreamingAgent, job: RunRequest, tell: Tell | None) -> RunResult:
    tool_errors = 0
    done: Done | None = None
    output = Output()
    deadline = Deadline(job.remaining_s)
    with guarded():
        source = agent.stream(job)
    async with Opened(source) as events, deadline.enforced():
        async for event in events:
            if isinstance(event, ErrorEvent):
                raise error_for(event.code or AgentFailed.code, event.error, task_id=job.task_id)
            if isinstance(event, ToolCallEnd):
                tool_errors += event.failed
            text = getattr(event, "text", "")
            output.add(len(text) if isinstance(text, str) else 0)
            if isinstance(event, Done):
                done = event
            elif tell is not None:
                await tell(event)
            deadline.check()  # it may have been deaf to its end
    if done is None or not done.content or done.content.isspace():
        raise AgentFailed("the agent ended without an answer", task_id=job.task_id)
    return result_of(done, tool_errors=tool_errors)


def raised(error: BaseException, job: RunRequest) -> AgentFailed:
    """Return what is published of an exception of user code, its type; its text goes to the log."""
    log.warning("agent_raised", task_id=job.task_id, attempt=job.attempt, node_id=job.node_id, **described(error))
    return AgentFailed(f"the agent raised {type_name(error)}", task_id=job.task_id)


def result_of(done: Done, *, tool_errors: int = 0) -> RunResult:
    """Return the result an agent's last event stands for, its content cut to what a message may carry.

    Raises:
        AgentFailed: A field is of another type than it should be, or out of its range.
    """
    content, truncated = cut_utf8(done.content, MAX_CONTENT_BYTES)
    try:
        result = RunResult(
            content=content,
            truncated=truncated,
            prompt_tokens=max(0, done.usage.prompt_tokens),
            completion_tokens=max(0, done.usage.completion_tokens),
            estimated_usage=done.usage.estimated,
            steps=done.steps,
            tool_errors=tool_errors,
            duration_s=done.duration_ms / 1000,
        )
        return decode(encode(result), RunResult)  # integers are checked by decoding alone
    except (Undecodable, ValueError) as error:
        message = error.message if isinstance(error, Undecodable) else str(error)
        raise AgentFailed(f"the agent's result makes no sense: {message}") from error


def failed(error: LoomError, node_id: str) -> tuple[TaskError, RunResult | None]:
    """Return the error that is published for a run, and what the run has cost."""
    try:
        return failure_of(error, node_id), spent_by(error)
    except BaseException:  # noqa: BLE001 - a class of the user's may raise when it is looked at
        message = f"the agent raised {type_name(error)}"
        return TaskError(code=AgentFailed.code, message=message, node_id=node_id), None


def spent_by(error: LoomError) -> RunResult | None:
    """Return what a failed run has cost and written, where its agent says so and it makes sense."""
    try:
        return result_of(error.spent) if isinstance(error.spent, Done) else None
    except Exception:  # noqa: BLE001 - made by user code: that the run failed is what must be told
        return None


def failure_of(error: LoomError, node_id: str) -> TaskError:
    """Return the error that is published for an agent's: without secrets, and in a form that can be sent."""
    wait = error.retry_after_s
    usable = isinstance(wait, int | float) and 0 <= wait <= MOST_WAIT_S
    return TaskError(
        code=error.code if error.code in OWN_CODES else AgentFailed.code,
        message=_publishable(error.message, error),
        node_id=node_id,
        retry_after_s=float(wait) if usable else None,
    )


def _publishable(message: Any, error: LoomError) -> str:
    if not isinstance(message, str):
        return f"the agent raised {type_name(error)}"
    return redact(text_of(message[: 4 * MAX_MESSAGE_CHARS]))[:MAX_MESSAGE_CHARS]
