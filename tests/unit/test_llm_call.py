"""A model request of a phase: bounded in time and tokens, sent twice at most, and not sent while the model is down."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.logs import capture_logs
from support.wait import until

from loom.phases.shared.circuit_breaker import MAX_FAILURES, OPEN_S, CircuitBreaker, breaker_for
from loom.phases.shared.llm_call import RETRY_TOKENS_FACTOR, LLMAnswer, call_llm, is_affordable
from loom.schemas.errors import AgentFailed, BudgetExceeded, DeadlineExceeded, InvalidPlan
from loom.schemas.llm import CompletionParams, CompletionResult, StreamChunk, Usage, UserMessage
from loom.schemas.task import PhaseUsage

QUESTION = CompletionParams(messages=(UserMessage("four"),), json_schema={"type": "object"}, max_tokens=10)


class Model:
    """Gives these answers, repeats the last one, or raises them; records its requests."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), list[CompletionParams]()

    async def complete(self, params: CompletionParams) -> CompletionResult:
        self.asked.append(params)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return CompletionResult(content=answer) if isinstance(answer, str) else answer

    def stream(self, params: CompletionParams) -> AsyncIterator[StreamChunk]:
        raise NotImplementedError


class Status(Exception):
    def __init__(self, status_code: int) -> None:
        super().__init__("refused")
        self.status_code = status_code


def caused(error: AgentFailed, cause: Exception) -> AgentFailed:
    error.__cause__ = cause
    return error


def number(text: str) -> int:
    if not text.isdecimal():
        raise InvalidPlan("not a number")
    return int(text)


async def put(model: Model, **facts: Any) -> LLMAnswer[int]:
    return await call_llm(model, QUESTION, number, **{"within_s": 10.0, **facts})


async def test_an_answer_has_its_token_usage() -> None:
    completion = CompletionResult(content="7", usage=Usage(prompt_tokens=5, completion_tokens=2))
    assert await put(Model(completion)) == LLMAnswer(7, PhaseUsage(requests=1, prompt_tokens=5, completion_tokens=2))


@pytest.mark.parametrize("usage", [None, Usage(prompt_tokens=-1), Usage(prompt_tokens=10**20), "many"])
async def test_tokens_that_are_not_reported_are_estimated(usage: Any) -> None:
    answer = await put(Model(CompletionResult(content="70000", usage=usage)))
    assert answer.usage == PhaseUsage(requests=1, prompt_tokens=1, completion_tokens=2, estimated=True)


@pytest.mark.parametrize(
    "first",
    [
        "seven",
        "",
        Status(400),
        caused(AgentFailed("refused the request (400)"), Status(422)),
        caused(AgentFailed("the answer could not be read (TypeError)"), TypeError()),
        CompletionResult(content=["7"]),  # type: ignore[arg-type]  # a provider of a user's own
    ],
)
async def test_a_refused_or_unreadable_question_is_put_once_more_without_a_response_format(first: Any) -> None:
    model = Model(first, "7")
    answer = await put(model)
    assert (answer.value, answer.usage.requests) == (7, 2)
    assert [asked.json_schema is None for asked in model.asked] == [False, True]


async def test_an_answer_that_was_cut_gets_more_room() -> None:
    model = Model(CompletionResult(content="", finish_reason="length"), "7")
    assert (await put(model)).value == 7
    assert model.asked[1].max_tokens == 10 * RETRY_TOKENS_FACTOR


async def test_a_question_is_not_put_a_third_time() -> None:
    model = Model("seven")
    answer = await put(model)
    assert (answer.value, answer.why, len(model.asked)) == (None, "its answer could not be read", 2)
    assert isinstance(answer.error, InvalidPlan)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("down, key sk-1"),
        ConnectionRefusedError(),
        TimeoutError(),
        DeadlineExceeded("late"),
        Status(503),
        caused(AgentFailed("the connection failed"), OSError()),
        asyncio.CancelledError(),
    ],
)
async def test_a_model_without_an_answer_gets_one_request(error: BaseException) -> None:
    model = Model(error)
    answer = await put(model)
    assert (answer.value, len(model.asked)) == (None, 1)
    assert "sk-1" not in answer.why


async def test_an_exception_with_a_raising_str_is_a_failure_like_any_other() -> None:
    class Evil(Exception):
        @property
        def status_code(self) -> int:
            raise KeyboardInterrupt

    answer = await put(Model(Evil()))
    assert (answer.value, answer.why) == (None, "Evil")


async def test_the_second_request_contains_the_mistake() -> None:
    model = Model("seven", "7")
    await put(model, repair=lambda answer, error: (UserMessage(f"{answer}: {error.message}"),))
    assert [message.content for message in model.asked[1].messages] == ["four", "seven: not a number"]


async def test_a_request_ends_in_time_even_if_its_provider_swallows_the_cancel() -> None:
    ended = asyncio.Event()

    class Deaf(Model):
        async def complete(self, params: CompletionParams) -> CompletionResult:
            self.asked.append(params)
            while not ended.is_set():
                try:
                    await ended.wait()
                except asyncio.CancelledError:
                    continue
            raise RuntimeError("too late")

    model, began = Deaf(), time.monotonic()
    answer = await put(model, within_s=0.05)
    assert (answer.value, answer.why) == (None, "TimeoutError")
    assert time.monotonic() - began < 1
    assert (model.asked[0].timeout_s or 1) <= 0.05
    ended.set()


async def test_a_cancelled_phase_cancels_its_question() -> None:
    cancelled = asyncio.Event()

    class Slow(Model):
        async def complete(self, params: CompletionParams) -> CompletionResult:
            self.asked.append(params)
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
            raise AssertionError

    model = Slow()
    asking = asyncio.ensure_future(put(model))
    await until(lambda: model.asked, what="the question")
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.wait_for(cancelled.wait(), 1)


async def test_a_question_beyond_the_budget_is_not_put() -> None:
    model = Model("7")
    answer = await put(model, budget=10)
    assert (answer.value, answer.usage, model.asked) == (None, PhaseUsage(), [])
    assert isinstance(answer.error, BudgetExceeded)
    assert (await put(model, budget=11)).value == 7


async def test_the_second_request_has_the_remaining_budget_of_the_first() -> None:
    first = CompletionResult(content="x", usage=Usage(prompt_tokens=1, completion_tokens=5))
    model = Model(first, "7")
    assert (await put(model, budget=15)).value is None
    assert len(model.asked) == 1


def test_without_a_budget_everything_is_affordable() -> None:
    assert is_affordable(QUESTION, None)
    assert not is_affordable(QUESTION, 0)


# -- a model that is down


async def test_a_model_with_three_failures_in_a_row_gets_no_requests_for_a_while() -> None:
    model = Model(RuntimeError("down"))
    with capture_logs() as logs:
        for _ in range(MAX_FAILURES):
            await put(model)
        answer = await put(model)
    assert len(model.asked) == MAX_FAILURES
    assert "not asked for a while" in answer.why
    assert isinstance(answer.error, AgentFailed)
    assert [entry["event"] for entry in logs].count("llm_call_failed") == MAX_FAILURES


async def test_an_answer_in_between_starts_the_count_again() -> None:
    model = Model(RuntimeError(), RuntimeError(), "7", RuntimeError(), RuntimeError(), "7")
    values = [(await put(model)).value for _ in range(6)]
    assert values == [None, None, 7, None, None, 7]


@pytest.mark.parametrize("answer", ["seven", Status(400)])
async def test_a_model_that_refuses_is_not_down(answer: Any) -> None:
    model = Model(answer)
    for _ in range(2 * MAX_FAILURES):
        await put(model)
    assert len(model.asked) == 4 * MAX_FAILURES


async def test_a_short_deadline_does_not_mark_a_model_as_down() -> None:
    class Slow(Model):
        async def complete(self, params: CompletionParams) -> CompletionResult:
            self.asked.append(params)
            await asyncio.Event().wait()
            raise AssertionError

    model = Slow()
    for _ in range(2 * MAX_FAILURES):
        await put(model, within_s=0.001)
    assert breaker_for(model).allow_request()


def test_a_model_that_is_down_is_probed_once_in_thirty_seconds() -> None:
    now = [0.0]
    breaker = CircuitBreaker(lambda: now[0])
    for _ in range(MAX_FAILURES):
        assert breaker.allow_request()
        breaker.record_failure()
    now[0] = OPEN_S - 0.01
    assert not breaker.allow_request()
    now[0] = OPEN_S
    assert [breaker.allow_request(), breaker.allow_request()] == [True, False]
    now[0] = 2 * OPEN_S
    assert breaker.allow_request()
    breaker.record_failure()
    assert not breaker.allow_request()
    now[0] = 3 * OPEN_S
    assert breaker.allow_request()
    breaker.record_success()
    assert [breaker.allow_request(), breaker.allow_request()] == [True, True]


def test_the_phases_of_a_process_share_the_state_of_a_provider() -> None:
    one, other = Model("7"), Model("7")
    assert breaker_for(one) is breaker_for(one)
    assert breaker_for(one) is not breaker_for(other)


def test_a_provider_without_weak_references_gets_every_request() -> None:
    class Slotted:
        __slots__ = ()
        complete = stream = None

    breaker_for(Slotted()).record_failure()  # type: ignore[arg-type]  # not a whole provider
    assert breaker_for(Slotted()).allow_request()  # type: ignore[arg-type]  # as above
