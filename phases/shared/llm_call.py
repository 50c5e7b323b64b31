"""One question of a phase to a model: with a deadline, a budget, and a short memory of a model that is down."""

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
"""Bytes of a text that count as a token where a model reports none."""
REFUSED_STATUSES = frozenset({400, 404, 415, 422, 501})
"""Statuses by which a server refuses a request for what it asks: without a response format it may answer."""
MAX_CAUSES = 8
MIN_CONCLUSIVE_S = 5.0
"""Less time than this is too little to conclude from a silence that a model is down."""
RETRY_TOKENS_FACTOR = 4
"""An answer that was cut may be so many times longer when it is asked for again: reasoning counts too."""
MAX_REPORTED = 10**12
"""A greater number of tokens is nonsense."""
NO_USAGE = PhaseUsage()
NO_BUDGET = "the token budget does not allow it"
MODEL_DOWN = "it has failed several times in a row and is not asked for a while"


RepairMessages = Callable[[str, LoomError], tuple[Message, ...]]
"""(answer, why it could not be read) -> what is added to the conversation before the question is ask again."""


@dataclass(frozen=True)
class LLMAnswer(Generic[T]):
    """What came of a question."""

    value: T | None
    """None: no readable answer came, or the model was not asked."""
    usage: PhaseUsage = NO_USAGE
    why: str = ""
    """Why there is no value: for people, without any text of the model's or the provider's."""
    error: Exception | None = None
    """What the provider or the reader of its answer raised last, where there is no value."""


async def call_llm(
    llm: LLMProvider,
    params: CompletionParams,
    read: Callable[[str], T],
    *,
    within_s: float,
    budget: int | None = None,
    repair: RepairMessages | None = None,
) -> LLMAnswer[T]:
    """Ask a model, and once more without a response format where it refuses one or its answer cannot be read.

    A model that is down is not asked: after three failures in a row one question in 30 s finds out whether it is back.
    Nothing but a cancellation is raised.

    Args:
        params: The question; its `timeout_s` is set here.
        read: Returns the value in an answer; raises LoomError for an answer that has none.
        within_s: Seconds for everything.
        budget: Tokens it may take, prompt and longest answer together; None: no limit.
        repair: Makes the messages that follow an answer that cannot be read; None: the same question is ask again.
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
    """Return the question as it is ask again: without a response format, and with more room after an answer cut."""
    messages, most = params.messages, params.max_tokens
    if repair is not None and isinstance(failure.error, LoomError) and failure.text is not None:
        messages = (*messages, *repair(failure.text, failure.error))
    if failure.cut and most is not None:
        most *= RETRY_TOKENS_FACTOR
    return replace(params, messages=messages, json_schema=None, max_tokens=most)


@dataclass(frozen=True)
class _CallFailure:
    """Why a question has no value for an answer."""

    error: Exception
    why: str
    text: str | None = None
    """The answer, where one came."""
    down: bool = False
    """Whether no answer came at all."""
    retryable: bool = False
    """Whether the model may answer a question without a response format."""
    timed_out: bool = False
    """Whether its time ran out."""
    cut: bool = False
    """Whether the answer reached its longest length."""


class _Conversation(Generic[T]):
    """The questions ask to a model until one answer can be read."""

    def __init__(self, llm: LLMProvider, read: Callable[[str], T], due: float) -> None:
        self._llm, self._read, self._due = llm, read, due
        self.value: T | None = None
        self.usage = NO_USAGE

    async def ask(self, params: CompletionParams) -> _CallFailure | None:
        """Ask, and keep the value; return what went wrong, if anything did."""
        left_s = self._due - asyncio.get_running_loop().time()
        if left_s <= 0:
            return _CallFailure(TimeoutError(), "TimeoutError", down=True, timed_out=True)
        self.usage = self.usage.plus(PhaseUsage(requests=1))
        try:
            result: Any = await run_within(self._llm.complete(replace(params, timeout_s=left_s)), left_s)
            text = result.content if isinstance(result.content, str) else ""
            self.usage = self.usage.plus(usage_of(params, result.usage, text))
        except Exception as error:  # noqa: BLE001 - a user's provider may raise anything; the phase goes on without
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
    except BaseException:  # noqa: BLE001 - a class of a user's may raise anything when it is looked at
        return _CallFailure(AgentFailed("the model's provider failed"), type_name(error), down=True)


def _classify(error: Exception) -> _CallFailure:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < MAX_CAUSES:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__  # HTTP libraries drop the cause of a refused connection
    statuses = [status for each in chain if isinstance(status := getattr(each, "status_code", None), int)]
    if statuses:
        refused = statuses[0] in REFUSED_STATUSES
        return _CallFailure(error, type_name(error), down=not refused, retryable=refused)
    timed_out = any(isinstance(each, TimeoutError | DeadlineExceeded) for each in chain)
    no_answer = timed_out or any(isinstance(each, OSError) for each in chain)
    unreadable = isinstance(error, AgentFailed) and not no_answer  # an answer that made no sense to the provider
    return _CallFailure(error, type_name(error), down=True, retryable=unreadable, timed_out=timed_out)


_abandoned: set[asyncio.Task[Any]] = set()
"""Questions whose provider has not heeded its cancellation yet."""


async def run_within(question: Coroutine[Any, Any, T], seconds: float) -> T:
    """Return what a user's coroutine returns; one that swallows its cancellation is left behind.

    Raises:
        TimeoutError: It took longer.
        RuntimeError: It has cancelled itself.
        Whatever it raises.
    """
    task = asyncio.ensure_future(question)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise TimeoutError
        if task.cancelled():
            raise RuntimeError("the question was cancelled, and not from here")
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
    """Return whether the question and its longest answer fit in a budget of tokens."""
    return budget is None or _estimate_tokens(_prompt_text(params)) + (params.max_tokens or 0) <= budget


def usage_of(params: CompletionParams, used: Usage | None, text: str) -> PhaseUsage:
    """Return the tokens of an answer as its model reports them, else estimated from the lengths of the texts."""
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
