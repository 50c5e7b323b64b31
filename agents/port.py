"""What an agent is, and how its stream becomes one result."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Protocol, runtime_checkable

from loom.agents.deadline import Deadline
from loom.schemas.errors import AgentFailed, error_for
from loom.schemas.events import AgentEvent, Done, ErrorEvent, Progress, TextDelta, ToolCallEnd
from loom.schemas.run import RunRequest
from loom.schemas.task import RunResult
from loom.schemas.wire import MAX_CONTENT_BYTES, cut_utf8

Tell = Callable[[Progress], Awaitable[None]]

DELTA_CHARS = 4096
"""Most characters of one TextDelta cut from a text that came whole."""


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
        LoomError: The agent failed; an ErrorEvent, an empty answer or none at all counts as failing.
    """
    tool_errors = 0
    done: Done | None = None
    async with aclosing(Deadline(job.remaining_s).each(agent.stream(job))) as events:
        async for event in events:
            if isinstance(event, ErrorEvent):
                raise error_for(event.code or AgentFailed.code, event.error, task_id=job.task_id)
            if isinstance(event, ToolCallEnd):
                tool_errors += event.failed
            if isinstance(event, Done):
                done = event
            elif tell is not None:
                await tell(event)
    if done is None or not done.content.strip():
        raise AgentFailed("the agent ended without an answer", task_id=job.task_id)
    return result_of(done, tool_errors=tool_errors)


def result_of(done: Done, *, tool_errors: int = 0) -> RunResult:
    """Return the result an agent's last event stands for, its content cut to what a message may carry."""
    content, truncated = cut_utf8(done.content, MAX_CONTENT_BYTES)
    return RunResult(
        content=content,
        truncated=truncated,
        prompt_tokens=done.usage.prompt_tokens,
        completion_tokens=done.usage.completion_tokens,
        estimated_usage=done.usage.estimated,
        steps=done.steps,
        tool_errors=tool_errors,
        duration_s=done.duration_ms / 1000,
    )
