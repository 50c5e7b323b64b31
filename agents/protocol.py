"""The agent protocol, and the conversion of an agent's stream into a result."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from msgspec.structs import replace

from loom.agents.deadline import Deadline
from loom.agents.job import MAX_USD, Job, Spent, check_budget
from loom.agents.run_context import RunContext
from loom.agents.signatures import accepts_run_context
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

OnProgress = Callable[[Progress], Awaitable[None]]

MAX_TEXT_CHARS = 4 * 2**20
"""Characters of text beyond which the output of a run counts as endless."""
MAX_EVENTS = 100_000
"""Events or pieces of text beyond which the output of a run counts as endless."""
MAX_MESSAGE_CHARS = 2000
OWN_CODES = frozenset({"agent_failed", "budget_exceeded", "deadline_exceeded", "invalid_task", "subtask_failed"})
"""Codes that the error of a run may have; other codes are reserved for the cluster."""
MAX_RETRY_AFTER_S = 1e9
"""A longer `retry_after_s` (about thirty years) is ignored."""


@runtime_checkable
class StreamingAgent(Protocol):
    """An object that works on jobs: `stream` yields progress events and a final Done, or raises a LoomError."""

    def stream(self, job: RunRequest) -> AsyncIterator[AgentEvent]:
        """Work on `job`."""
        ...


class Output:
    """Counts the output of an agent, and stops endless output."""

    def __init__(self) -> None:
        self._chars = 0
        self._events = 0

    def add(self, chars: int) -> None:
        """Count an event.

        Args:
            chars: Characters of text in the event.

        Raises:
            AgentFailed: The output exceeds 4 MiB of text or 100,000 events.
        """
        self._chars += chars
        self._events += 1
        if self._chars > MAX_TEXT_CHARS or self._events > MAX_EVENTS:
            limit = f"{MAX_TEXT_CHARS // 2**20} MiB of text or {MAX_EVENTS:,} events"
            raise AgentFailed(f"endless output: more than {limit}")


async def collect(
    agent: StreamingAgent,
    request: RunRequest,
    on_progress: OnProgress | None = None,
    *,
    run_context: RunContext | None = None,
    remaining_s: float | None = None,
) -> RunResult:
    """Run a request to its end and return the result, including the costs that the agent has reported.

    Args:
        on_progress: Called with each progress event.
        run_context: Context of the run on a host, for agents whose `stream` has a parameter of this name.
        remaining_s: Seconds to the deadline; default: those of the request.

    Raises:
        LoomError: The agent failed: it raised, yielded an ErrorEvent, or gave an empty, endless or invalid answer.
            Of other exceptions, the error has only the type and the log has the text. `spent` has the costs.
        BudgetExceeded: The run used more than the request's `token_budget`.
        asyncio.CancelledError: The current task was cancelled.
    """
    job = Job.of(request) if remaining_s is None else Job.of(request, remaining_s=remaining_s)
    try:
        return await _collect(agent, job, on_progress, run_context)
    except LoomError as error:
        _add_reported_costs(error, job.spent)
        raise
    except BaseException as error:  # an agent is user code and may raise anything
        if ends_task(error):
            raise
        failure = raised(error, job)
        _add_reported_costs(failure, job.spent)
        raise failure from error


async def _collect(
    agent: StreamingAgent, job: Job, on_progress: OnProgress | None, run_context: RunContext | None
) -> RunResult:
    collector = _Collector(job)
    deadline = Deadline(job.remaining_s)
    with contain():
        arguments = {"run_context": run_context} if run_context is not None and accepts_run_context(agent) else {}
        source = agent.stream(job, **arguments)
        if not hasattr(source, "__aiter__"):
            raise AgentFailed(f"stream returned a {type(source).__name__}: make it an async generator")
    async with ClosingIterator(source) as items, deadline.enforced():
        async for item in items:
            for event in collector.add(item):
                if on_progress is not None:
                    await on_progress(event)
            deadline.check()  # the agent may have ignored its cancellation
    return collector.result()


_PROGRESS_ONLY = frozenset(EVENTS) - {ErrorEvent, ToolCallEnd, Done}
"""Events that are passed on and do not affect the result."""


class _Collector:
    """Collects the values that an agent yields."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._output = Output()
        self._done: Done | None = None
        self._texts: list[str] = []
        """Text that was not yielded as events; it is the answer if there is no Done."""
        self._tool_errors = 0

    def add(self, item: Any) -> Iterable[Progress]:
        """Add a yielded value, and return its progress events.

        Raises:
            LoomError: The value is an ErrorEvent or not an event, or the output is endless.
        """
        self._output.add(_size(item))
        if isinstance(item, str):
            self._texts.append(item)
        events = events_of(item)
        if len(events) == 1 and type(events[0]) in _PROGRESS_ONLY:
            return events  # type: ignore[return-value]  # none of them is a Done
        return self._progress_in(events)

    def _progress_in(self, events: Iterable[AgentEvent]) -> Iterator[Progress]:
        """Yield the events that are progress, and keep what the others mean for the result."""
        for event in events:
            if type(event) in _PROGRESS_ONLY:
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
        """Return the result, including the costs that the agent has reported.

        Raises:
            AgentFailed: There is no answer, or it is invalid.
            BudgetExceeded: The run used more than the task's `token_budget`.
        """
        done = self._done
        if done is None and self._texts:
            done = Done(content=to_text("".join(self._texts)), steps=1)
        if done is None or not done.content or done.content.isspace():
            message = "the agent ended without an answer: its last event must be a Done with content"
            raise AgentFailed(message, task_id=self._job.task_id)
        content = as_json_string(done.content, self._job.accept)
        if content is not done.content:
            done = replace(done, content=content)
        result = _with_reported_costs(result_of(done, tool_errors=self._tool_errors), self._job.spent)
        check_budget(self._job, result.tokens, spent=done)
        return result


def as_json_string(text: str, accept: Accept | None) -> str:
    """Return a text as a JSON string if the ad's schema requires a string and the text is not one yet.

    Example:
        >>> as_json_string("yes", Accept(json_schema={"type": "string", "enum": ["yes", "no"]}))
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


def _with_reported_costs(result: RunResult, spent: Spent) -> RunResult:
    """Return the result with the costs added that the agent has reported."""
    if not (spent.prompt_tokens or spent.completion_tokens or spent.usd):
        return result
    return replace(
        result,
        prompt_tokens=total(result.prompt_tokens, spent.prompt_tokens),
        completion_tokens=total(result.completion_tokens, spent.completion_tokens),
        usd=min(MAX_USD, result.usd + spent.usd),
    )


def _add_reported_costs(error: LoomError, spent: Spent) -> None:
    """Add the costs that the agent has reported to the `spent` of its error."""
    if not spent.tokens and not spent.usd:
        return
    known = spent_by(error)
    before, result = (Done(), RunResult()) if known is None else (vars(error)["spent"], known)
    after = TokenUsage(
        prompt_tokens=total(result.prompt_tokens, spent.prompt_tokens),
        completion_tokens=total(result.completion_tokens, spent.completion_tokens),
        estimated_cost=result.usd + spent.usd,
        estimated=result.estimated_usage,
    )
    vars(error)["spent"] = replace(before, usage=after)


def raised(error: BaseException, job: RunRequest) -> AgentFailed:
    """Log an exception of user code, and return an error to publish that contains only its type."""
    log.warning("agent_raised", task_id=job.task_id, attempt=job.attempt, node_id=job.node_id, **error_fields(error))
    return AgentFailed(f"the agent raised {type_name(error)}", task_id=job.task_id)


def usage_in(done: Done) -> TokenUsage:
    """Return the usage of a Done; user code builds it unchecked, so it may be None."""
    given: TokenUsage | None = getattr(done, "usage", None)
    return TokenUsage() if given is None else given


def result_of(done: Done, *, tool_errors: int = 0) -> RunResult:
    """Return the result of a Done, with its content cut to the size limit of a message.

    Args:
        done: The last event of an agent. A usage or a count of None counts as 0.
        tool_errors: Number of failed tool calls.

    Raises:
        AgentFailed: A field has the wrong type or is out of range.
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
        return decode(encode(result), RunResult)  # only decoding checks integers
    except (Undecodable, ValueError, TypeError, AttributeError) as error:  # user code builds events unchecked
        message = error.message if isinstance(error, Undecodable) else str(error)
        message = "a count is not a number" if isinstance(error, TypeError | AttributeError) else message
        raise AgentFailed(f"the agent's result is not valid: {message}") from error


def failed(error: LoomError, request: RunRequest) -> tuple[TaskError, RunResult | None]:
    """Return the error to publish for a run, and the costs of the run."""
    try:
        return failure_of(error, request), spent_by(error)
    except BaseException:  # noqa: BLE001 - attributes of a user's class may raise anything
        message = f"the agent raised {type_name(error)}"
        return TaskError(code=AgentFailed.code, message=message, node_id=request.node_id), None


def spent_by(error: LoomError) -> RunResult | None:
    """Return the costs and the text of a failed run, if its error has them and they are valid."""
    try:
        spent = vars(error).get("spent")  # set on errors of any class
        return result_of(spent) if isinstance(spent, Done) else None
    except Exception:  # noqa: BLE001 - user code made it; the error is published without it
        return None


def failure_of(error: LoomError, request: RunRequest) -> TaskError:
    """Return the error to publish for an error of an agent: without secrets, and with valid fields only.

    An InvalidTask about another task, such as one that the agent submits itself, becomes an `agent_failed`.
    """
    wait: Any = error.retry_after_s  # user code may set anything
    usable = isinstance(wait, int | float) and 0 <= wait <= MAX_RETRY_AFTER_S
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
