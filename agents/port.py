"""What an agent is, and how its stream becomes one result."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Protocol, runtime_checkable

from loom.agents.deadline import Deadline
from loom.agents.user_code import Opened, text_of
from loom.schemas.errors import AgentFailed, LoomError, error_for
from loom.schemas.events import AgentEvent, Done, ErrorEvent, Progress, TextDelta, ToolCallEnd
from loom.schemas.run import RunRequest
from loom.schemas.task import RunResult, TaskError
from loom.schemas.wire import MAX_CONTENT_BYTES, Undecodable, cut_utf8, decode, encode

Tell = Callable[[Progress], Awaitable[None]]

DELTA_CHARS = 4096
"""Most characters of one TextDelta cut from a text that came whole."""
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


def deltas(text: str) -> Iterator[TextDelta]:
    """Yield `text` in pieces."""
    for start in range(0, len(text), DELTA_CHARS):
        yield TextDelta(text=text[start : start + DELTA_CHARS])


async def collect(agent: StreamingAgent, job: RunRequest, tell: Tell | None = None) -> RunResult:
    """Run `job` to its end and return the result.

    Args:
        tell: Hears all progress as it comes.

    Raises:
        LoomError: The agent failed; an ErrorEvent, an empty answer, none at all or a senseless one counts as failing.
    """
    tool_errors = 0
    done: Done | None = None
    deadline = Deadline(job.remaining_s)
    async with Opened(agent.stream(job)) as events, deadline.enforced():
        async for event in events:
            if isinstance(event, ErrorEvent):
                raise error_for(event.code or AgentFailed.code, event.error, task_id=job.task_id)
            if isinstance(event, ToolCallEnd):
                tool_errors += event.failed
            if isinstance(event, Done):
                done = event
            elif tell is not None:
                await tell(event)
            deadline.check()  # it may have been deaf to its end
    if done is None or not done.content.strip():
        raise AgentFailed("the agent ended without an answer", task_id=job.task_id)
    return result_of(done, tool_errors=tool_errors)


def result_of(done: Done, *, tool_errors: int = 0) -> RunResult:
    """Return the result an agent's last event stands for, its content cut to what a message may carry.

    Raises:
        AgentFailed: A field is of another type than it should be, or out of its range.
    """
    content, truncated = cut_utf8(done.content, MAX_CONTENT_BYTES)
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
    try:
        return decode(encode(result), RunResult)  # built unchecked: who reads it elsewhere would refuse it
    except Undecodable as error:
        raise AgentFailed(f"the agent's result makes no sense: {error.message}") from error


def spent_by(error: LoomError) -> RunResult | None:
    """Return what a failed run has cost and written, where its agent says so and it makes sense."""
    try:
        return result_of(error.spent) if isinstance(error.spent, Done) else None
    except Exception:  # noqa: BLE001 - made by user code: that the run failed is what must be told
        return None


def failure_of(error: LoomError, node_id: str) -> TaskError:
    """Return what an agent's error says to the cluster: whatever it was made of, it can be sent."""
    wait = error.retry_after_s
    usable = isinstance(wait, int | float) and 0 <= wait <= MOST_WAIT_S
    return TaskError(
        code=error.code if error.code in OWN_CODES else AgentFailed.code,
        message=text_of(str(error.message))[:MAX_MESSAGE_CHARS],
        node_id=node_id,
        retry_after_s=float(wait) if usable else None,
    )
