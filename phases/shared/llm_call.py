"""One call of a phase to a model: with a deadline, a budget, one retry and a circuit breaker."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from msgspec.structs import replace

from loom.bus.logs.log_fields import type_name
from loom.bus.logs.logger import get_logger
from loom.phases.shared.circuit_breaker import breaker_for
from loom.schemas.errors import AgentFailed, BudgetExceeded, DeadlineExceeded, LoomError
from loom.schemas.llm import CompletionParams, LLMProvider, Message, Usage
from loom.schemas.task import PhaseUsage

T = TypeVar("T")

log = get_logger()

CHARS_PER_TOKEN = 4
"""Bytes of text that are estimated as one token where a model reports no usage."""
REFUSED_STATUSES = frozenset({400, 404, 415, 422, 501})
"""HTTP statuses of a refused request, which may succeed without a response format."""
MAX_CAUSES = 8
MIN_CONCLUSIVE_S = 5.0
"""Least time limit, in seconds, whose expiry counts as a failure of the model."""
RETRY_TOKENS_FACTOR = 4
"""Factor of `max_tokens` in the retry after a truncated answer, because reasoning counts too."""
MAX_REPORTED = 10**12
"""Largest token count that is accepted from a model."""
NO_USAGE = PhaseUsage()
NO_BUDGET = "the token budget does not allow it"
MODEL_DOWN = "it has failed several times in a row and is not asked for a while"


RepairMessages = Callable[[str, LoomError], tuple[Message, ...]]
"""(answer, error of its reader) -> messages to append to the conversation before the retry."""


@dataclass(frozen=True)
class LLMAnswer(Generic[T]):
    """The result of a call to a model."""

    value: T | None
    """The value in the answer; None without a readable answer."""
    usage: PhaseUsage = NO_USAGE
    why: str = ""
    """Why there is no value, for people; contains no text of the model or the provider."""
    error: Exception | None = None
    """The last error of the provider or the reader, if there is no value."""


async def call_llm(
    llm: LLMProvider,
    params: CompletionParams,
    read: Callable[[str], T],
    *,
    within_s: float,
    budget: int | None = None,
    repair: RepairMessages | None = None,
) -> LLMAnswer[T]:
    """Ask a model; retry once without a response format if the model refuses the format or its answer cannot be read.

    A model with three consecutive failures counts as down and gets one call per 30 s. Only a cancellation is raised.

    Args:
        params: The request; its `timeout_s` is set here.
        read: Returns the value in an answer; raises LoomError for an answer without one.
        within_s: Seconds for the call and its retry.
        budget: Tokens that prompt and longest answer may use together; None: no limit.
        repair: Returns the messages to append after an unreadable answer; None: the retry repeats the request.
    """
    breaker = breaker_for(llm)
    if not is_affordable(params, budget):
        return LLMAnswer(None, why=NO_BUDGET, error=BudgetExceeded(NO_BUDGET))
    if not breaker.allow_request():
        return LLMAnswer(None, why=MODEL_DOWN, error=AgentFailed(f"the model was not asked: {MODEL_DOWN}"))
    conversation = _Conversation(llm, read, asyncio.get_running_loop().time() + max(0.001, within_s))
    failure = await conversation.ask(params)
    if failure is not None and failure.retryable:
        second = _retry_params(params, failure, repair)
        left = None if budget is None else budget - conversation.usage.tokens
        if is_affordable(second, left):
            failure = await conversation.ask(second)
    if failure is None or not failure.down:
        breaker.record_success()
    elif not failure.timed_out or within_s >= MIN_CONCLUSIVE_S:
        breaker.record_failure()
    if failure is not None:
        log.warning("llm_call_failed", reason=failure.why)
        return LLMAnswer(None, conversation.usage, failure.why, failure.error)
    return LLMAnswer(conversation.value, conversation.usage)


def _retry_params(params: CompletionParams, failure: "_CallFailure", repair: RepairMessages | None) -> CompletionParams:
    """Return the request of the retry: without a response format, with more tokens after a truncated answer."""
    messages, max_tokens = params.messages, params.max_tokens
    if repair is not None and isinstance(failure.error, LoomError) and failure.text is not None:
        messages = (*messages, *repair(failure.text, failure.error))
    if failure.cut and max_tokens is not None:
        max_tokens *= RETRY_TOKENS_FACTOR
    return replace(params, messages=messages, json_schema=None, max_tokens=max_tokens)


@dataclass(frozen=True)
class _CallFailure:
    """The failure of one request."""

    error: Exception
    why: str
    text: str | None = None
    """The answer, if any."""
    down: bool = False
    """Whether no answer arrived."""
    retryable: bool = False
    """Whether the model may answer a request without a response format."""
    timed_out: bool = False
    """Whether the time limit has passed."""
    cut: bool = False
    """Whether the answer was truncated at `max_tokens`."""


class _Conversation(Generic[T]):
    """The requests to a model until an answer is readable."""

    def __init__(self, llm: LLMProvider, read: Callable[[str], T], due: float) -> None:
        self._llm, self._read, self._due = llm, read, due
        self.value: T | None = None
        self.usage = NO_USAGE

    async def ask(self, params: CompletionParams) -> _CallFailure | None:
        """Send a request and store its value; return the failure, if any."""
        left_s = self._due - asyncio.get_running_loop().time()
        if left_s <= 0:
            return _CallFailure(TimeoutError(), "TimeoutError", down=True, timed_out=True)
        self.usage = self.usage.plus(PhaseUsage(requests=1))
        try:
            result: Any = await run_within(self._llm.complete(replace(params, timeout_s=left_s)), left_s)
            text = result.content if isinstance(result.content, str) else ""
            self.usage = self.usage.plus(usage_of(params, result.usage, text))
        except Exception as error:  # noqa: BLE001 - a user's provider may raise anything; the phase continues without it
            return _to_failure(error)
        try:
            self.value = self._read(text)
        except LoomError as error:
            cut = getattr(result, "finish_reason", None) == "length"
            return _CallFailure(error, "its answer could not be read", text, retryable=True, cut=cut)
        return None


def _to_failure(error: Exception) -> _CallFailure:
    try:
        return _classify(error)
    except BaseException:  # noqa: BLE001 - attributes of a user's exception may raise anything
        return _CallFailure(AgentFailed("the model's provider failed"), type_name(error), down=True)


def _classify(error: Exception) -> _CallFailure:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < MAX_CAUSES:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__  # HTTP libraries drop the cause of a refused connection
    statuses = [status for link in chain if isinstance(status := getattr(link, "status_code", None), int)]
    if statuses:
        refused = statuses[0] in REFUSED_STATUSES
        return _CallFailure(error, type_name(error), down=not refused, retryable=refused)
    timed_out = any(isinstance(link, TimeoutError | DeadlineExceeded) for link in chain)
    no_answer = timed_out or any(isinstance(link, OSError) for link in chain)
    unreadable = isinstance(error, AgentFailed) and not no_answer  # the provider could not decode the answer
    return _CallFailure(error, type_name(error), down=True, retryable=unreadable, timed_out=timed_out)


_abandoned: set[asyncio.Task[Any]] = set()
"""Calls of providers that have not stopped after their cancellation."""


async def run_within(call: Coroutine[Any, Any, T], seconds: float) -> T:
    """Return the result of a user's coroutine; abandon a coroutine that does not stop when cancelled.

    Raises:
        TimeoutError: The coroutine took longer than `seconds`.
        RuntimeError: The coroutine cancelled itself.
        Exception: Any error of the coroutine.
    """
    task = asyncio.ensure_future(call)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise TimeoutError
        if task.cancelled():
            raise RuntimeError("the call to the model cancelled itself")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            _abandoned.add(task)
            task.add_done_callback(_forget)


def _forget(task: asyncio.Task[Any]) -> None:
    _abandoned.discard(task)
    if not task.cancelled():
        task.exception()  # retrieved, so that asyncio does not log it


def is_affordable(params: CompletionParams, budget: int | None) -> bool:
    """Return whether a request and its longest answer fit into a budget of tokens."""
    return budget is None or _estimate_tokens(_prompt_text(params)) + (params.max_tokens or 0) <= budget


def usage_of(params: CompletionParams, used: Usage | None, text: str) -> PhaseUsage:
    """Return the usage that the model reports, or else an estimate from the lengths of the texts."""
    if isinstance(used, Usage) and _is_count(used.prompt_tokens) and _is_count(used.completion_tokens):
        return PhaseUsage(prompt_tokens=used.prompt_tokens, completion_tokens=used.completion_tokens)
    return PhaseUsage(
        prompt_tokens=_estimate_tokens(_prompt_text(params)), completion_tokens=_estimate_tokens(text), estimated=True
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_REPORTED


def _prompt_text(params: CompletionParams) -> str:
    return "".join(message.content for message in params.messages)


def _estimate_tokens(text: str) -> int:
    return -(-len(text.encode(errors="replace")) // CHARS_PER_TOKEN)
