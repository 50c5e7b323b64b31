"""What an agent is, and how its stream becomes one result."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from msgspec.structs import replace

from loom.agents.deadline import Deadline
from loom.agents.job import MAX_USD, Job, Spent, check_budget
from loom.agents.user_code import ClosingIterator, contain, ends_task, error_fields, type_name
from loom.agents.values import to_text
from loom.agents.yielded_values import EVENTS, deltas, events_of
from loom.bus.logs.logger import get_logger
from loom.bus.logs.redaction import redact
from loom.schemas.base import MAX_CONTENT_BYTES, Undecodable, cut_name, cut_utf8, decode, encode, total
from loom.schemas.errors import AgentFailed, InvalidTask, LoomError, error_for
from loom.schemas.events import AgentEvent, Done, ErrorEvent, Progress, TokenUsage, ToolCallEnd
from loom.schemas.run import RunRequest
from loom.schemas.task import Accept, RunResult, TaskError

__all__ = ["StreamingAgent", "collect", "deltas", "failed", "failure_of", "raised", "result_of"]

log = get_logger()

Tell = Callable[[Progress], Awaitable[None]]

MAX_TEXT_CHARS = 4 * 2**20
"""Characters of text beyond which a run counts as endless."""
MAX_EVENTS = 100_000
"""Events, or pieces of text, beyond which a run counts as endless."""
MAX_MESSAGE_CHARS = 2000
OWN_CODES = frozenset({"agent_failed", "budget_exceeded", "deadline_exceeded", "invalid_task", "subtask_failed"})
"""What a run may say of itself, and of what it has delegated. Any other code would speak for the cluster."""
MOST_WAIT_S = 1e9
"""A wait beyond this, some thirty years, means nothing."""


@runtime_checkable
class StreamingAgent(Protocol):
    """Anything that works on a job: it yields progress and, last, one Done; it fails by raising a LoomError."""

    def stream(self, job: RunRequest) -> AsyncIterator[AgentEvent]:
        """Work on `job`."""
        ...


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


async def collect(agent: StreamingAgent, request: RunRequest, tell: Tell | None = None) -> RunResult:
    """Run a request to its end and return the result, with what the agent has reported of its costs.

    Args:
        tell: Called with all progress as it comes.

    Raises:
        LoomError: The agent failed; an ErrorEvent, an empty answer, none at all, an endless or a senseless one counts
            as failing. Of any other exception only the type is named; its text is logged. `spent` has the costs.
        BudgetExceeded: The answer took more than the request's `token_budget`.
        asyncio.CancelledError: This task is cancelled.
    """
    job = Job.of(request)
    try:
        return await _collected(agent, job, tell)
    except LoomError as error:
        _charge(error, job.spent)
        raise
    except BaseException as error:  # an agent is user code: whatever it raises is its failure
        if ends_task(error):
            raise
        failure = raised(error, job)
        _charge(failure, job.spent)
        raise failure from error


async def _collected(agent: StreamingAgent, job: Job, tell: Tell | None) -> RunResult:
    seen = _Seen(job)
    deadline = Deadline(job.remaining_s)
    with contain():
        source = agent.stream(job)
        if not hasattr(source, "__aiter__"):
            raise AgentFailed(f"stream returned a {type(source).__name__}: make it an async generator")
    async with ClosingIterator(source) as items, deadline.enforced():
        async for item in items:
            for event in seen.events(item):
                if tell is not None:
                    await tell(event)
            deadline.check()  # it may have been deaf to its end
    return seen.result()


_SHOWN = frozenset(EVENTS) - {ErrorEvent, ToolCallEnd, Done}
"""Events that are shown and change nothing."""


class _Seen:
    """What an agent has yielded so far."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._output = Output()
        self._done: Done | None = None
        self._texts: list[str] = []
        """Text that was not yielded as events: the answer, if no Done comes."""
        self._tool_errors = 0

    def events(self, item: Any) -> Iterator[Progress]:
        """Take an item and yield its progress.

        Raises:
            LoomError: It is an ErrorEvent, not an event at all, or more than any answer takes.
        """
        self._output.add(_size(item))
        if isinstance(item, str):
            self._texts.append(item)
        for event in events_of(item):
            if type(event) in _SHOWN:
                yield event  # type: ignore[misc]  # none of them is a Done
                continue
            if isinstance(event, ErrorEvent):
                raise error_for(event.code or AgentFailed.code, event.error, task_id=self._job.task_id)
            if isinstance(event, ToolCallEnd):
                self._tool_errors += event.failed
            if isinstance(event, Done):
                self._done = event
            else:
                yield event

    def result(self) -> RunResult:
        """Return the result, with what the agent has reported of its costs.

        Raises:
            AgentFailed: There is no answer, or it makes no sense.
            BudgetExceeded: It took more than the task's `token_budget`.
        """
        done = self._done
        if done is None and self._texts:
            done = Done(content=to_text("".join(self._texts)), steps=1)
        if done is None or not done.content or done.content.isspace():
            message = "the agent ended without an answer: its last event must be a Done with content"
            raise AgentFailed(message, task_id=self._job.task_id)
        done = replace(done, content=quoted(done.content, self._job.accept))
        result = _with(result_of(done, tool_errors=self._tool_errors), self._job.spent)
        try:
            check_budget(self._job, result.tokens)
        except LoomError as error:
            error.facts["spent"] = done
            raise
        return result


def quoted(text: str, accept: Accept | None) -> str:
    """Return a bare text as a JSON string where the ad's schema wants a string, and any other as it is.

    Example:
        >>> quoted("yes", Accept(json_schema={"type": "string", "enum": ["yes", "no"]}))
        '"yes"'
    """
    schema = accept.json_schema if accept else None
    if schema is None or schema.get("type") != "string":
        return text
    try:
        decode(text.encode(), str)
    except Undecodable:
        return encode(text).decode()
    return text


def _size(item: Any) -> int:
    text = item if isinstance(item, str) else getattr(item, "text", "")
    return len(text) if isinstance(text, str) else 0


def _with(result: RunResult, spent: Spent) -> RunResult:
    """The result together with what the agent has reported on its way."""
    if not spent.tokens and not spent.usd:
        return result
    return replace(
        result,
        prompt_tokens=total(result.prompt_tokens, spent.prompt_tokens),
        completion_tokens=total(result.completion_tokens, spent.completion_tokens),
        usd=min(MAX_USD, result.usd + spent.usd),
    )


def _charge(error: LoomError, spent: Spent) -> None:
    """Add what the agent has reported to the costs that its error carries."""
    if not spent.tokens and not spent.usd:
        return
    known = spent_by(error)
    before, result = (Done(), RunResult()) if known is None else (error.spent, known)
    after = TokenUsage(
        prompt_tokens=total(result.prompt_tokens, spent.prompt_tokens),
        completion_tokens=total(result.completion_tokens, spent.completion_tokens),
        estimated_cost=result.usd + spent.usd,
        estimated=result.estimated_usage,
    )
    error.__dict__.setdefault("facts", {})["spent"] = replace(before, usage=after)


def raised(error: BaseException, job: RunRequest) -> AgentFailed:
    """Return what is published of an exception of user code, its type; its text goes to the log."""
    log.warning("agent_raised", task_id=job.task_id, attempt=job.attempt, node_id=job.node_id, **error_fields(error))
    return AgentFailed(f"the agent raised {type_name(error)}", task_id=job.task_id)


def usage_in(done: Done) -> TokenUsage:
    """Return the usage of an agent's last event, which user code builds unchecked; None is no usage."""
    given: TokenUsage | None = getattr(done, "usage", None)
    return TokenUsage() if given is None else given


def result_of(done: Done, *, tool_errors: int = 0) -> RunResult:
    """Return the result an agent's last event stands for, its content cut to what a message may carry.

    A usage or a count that is None is absent.

    Raises:
        AgentFailed: A field is of another type than it should be, or out of its range.
    """
    content, truncated = cut_utf8(done.content, MAX_CONTENT_BYTES)
    usage = usage_in(done)
    try:
        result = RunResult(
            content=content,
            truncated=truncated,
            prompt_tokens=max(0, usage.prompt_tokens or 0),
            completion_tokens=max(0, usage.completion_tokens or 0),
            estimated_usage=bool(usage.estimated),
            steps=done.steps or 0,
            tool_errors=tool_errors,
            duration_s=(done.duration_ms or 0.0) / 1000,
            usd=min(MAX_USD, max(0.0, usage.estimated_cost or 0.0)),
        )
        return decode(encode(result), RunResult)  # integers are checked by decoding alone
    except (Undecodable, ValueError, TypeError, AttributeError) as error:  # user code builds events unchecked
        message = error.message if isinstance(error, Undecodable) else str(error)
        message = "a count is not a number" if isinstance(error, TypeError | AttributeError) else message
        raise AgentFailed(f"the agent's result makes no sense: {message}") from error


def failed(error: LoomError, request: RunRequest) -> tuple[TaskError, RunResult | None]:
    """Return the error that is published for a run, and what the run has cost."""
    try:
        return failure_of(error, request), spent_by(error)
    except BaseException:  # noqa: BLE001 - a class of the user's may raise when it is looked at
        message = f"the agent raised {type_name(error)}"
        return TaskError(code=AgentFailed.code, message=message, node_id=request.node_id), None


def spent_by(error: LoomError) -> RunResult | None:
    """Return what a failed run has cost and written, where its agent says so and it makes sense."""
    try:
        return result_of(error.spent) if isinstance(error.spent, Done) else None
    except Exception:  # noqa: BLE001 - made by user code: that the run failed is what must be told
        return None


def failure_of(error: LoomError, request: RunRequest) -> TaskError:
    """Return the error that is published for an agent's: without secrets, and in a form that can be sent.

    An InvalidTask about another task, such as one that the agent submits itself, is the agent's own failure.
    """
    wait = error.retry_after_s
    usable = isinstance(wait, int | float) and 0 <= wait <= MOST_WAIT_S
    code = error.code if error.code in OWN_CODES else AgentFailed.code
    if code == InvalidTask.code and error.task_id not in (None, request.task_id):
        code = AgentFailed.code
    return TaskError(
        code=code,
        message=_publishable(error.message, error),
        field=_field(error.field) if code in (InvalidTask.code, error.code) else None,
        node_id=request.node_id,
        retry_after_s=float(wait) if usable else None,
    )


def _field(name: Any) -> str | None:
    return cut_name(redact(to_text(name[:MAX_MESSAGE_CHARS]))) if isinstance(name, str) else None


def _publishable(message: Any, error: LoomError) -> str:
    if not isinstance(message, str):
        return f"the agent raised {type_name(error)}"
    return redact(to_text(message[: 4 * MAX_MESSAGE_CHARS]))[:MAX_MESSAGE_CHARS]
