"""Agents made of ordinary Python functions."""

import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from msgspec.structs import replace

from loom.agents.job import Answer, Job
from loom.agents.protocol import Output, StreamingAgent, raised, usage_in
from loom.agents.signatures import check_stream, name_of, takes_text
from loom.agents.threaded import ThreadedIteration
from loom.agents.user_code import ClosingIterator, call, contain
from loom.agents.values import NotText, to_text
from loom.agents.yielded_values import EVENTS, deltas, event_in, events_of
from loom.schemas.base import MAX_CONTENT_BYTES, total
from loom.schemas.errors import AgentFailed, LoomError
from loom.schemas.events import AgentEvent, Done, StepEnd, StepStart, TextDelta, TokenUsage
from loom.schemas.run import RunRequest
from loom.schemas.task import RunResult


class FunctionAgent:
    """A function as an agent: async, sync (runs in a thread), or a generator of text pieces of either kind.

    Args:
        fn: Takes the text of the task, or the job where its parameter is annotated RunRequest or Job, or has no
            annotation and is named job, request, req or run. Returns text, anything JSON can carry, or an `Answer`;
            a generator may also yield events, or mappings with the `type` of an event.
        tools: Names of the tools it claims to have, for bids.
        name: What logs and errors call it; absent: the function's name.

    Raises:
        LoomError: `fn` does not take exactly one argument, or one that is neither text nor a job.
    """

    def __init__(self, fn: Callable[..., Any], *, tools: Sequence[str] = (), name: str | None = None) -> None:
        self.name = name or name_of(fn)
        self.tools = tuple(tools)
        self._fn = fn
        self._takes_text = takes_text(fn)

    async def stream(self, job: RunRequest) -> AsyncGenerator[AgentEvent, None]:
        """Call the function for `job`; the caller ends it when the time is up.

        Raises:
            AgentFailed: It raised, returned nothing or what is not text, or yielded text without end.
        """
        started = time.monotonic()
        written = _Written()
        yield StepStart(step=1, total_steps=1)
        try:
            async with aclosing(self._events(job, written)) as events:
                async for event in events:
                    yield event
        except LoomError as error:
            if error.spent is None and written.content:
                error.__dict__.setdefault("facts", {})["spent"] = Done(content=written.content, usage=written.usage)
            raise
        except NotText as error:
            raise AgentFailed(f"{self.name} gave no text: {error}", task_id=job.task_id) from error
        except Exception as error:  # a user's function may raise anything
            raise raised(error, job) from error
        if not written.content.strip():
            raise AgentFailed(f"{self.name} returned nothing", task_id=job.task_id)
        yield StepEnd(step=1)
        duration_ms = (time.monotonic() - started) * 1000
        yield Done(content=written.content, steps=1, duration_ms=duration_ms, usage=written.usage)

    async def _events(self, job: RunRequest, written: "_Written") -> AsyncGenerator[AgentEvent, None]:
        job = job if isinstance(job, Job) else Job.of(job)
        result = await call(self._fn, job.description if self._takes_text else job)
        with contain():
            source = _iteration(result)
        if source is not None:
            async with ClosingIterator(source) as pieces:
                async for piece in pieces:
                    for event in written.add(piece):
                        yield event
        elif result is not None:
            for event in written.whole(result):
                yield event


def _iteration(result: Any) -> AsyncIterable[Any] | None:
    """What a function yields; None where it has returned its answer."""
    if type(result) is str:
        return None
    if isinstance(result, Generator):
        return ThreadedIteration(result)
    return result if hasattr(result, "__aiter__") else None


class _Written:
    """What a function has written, kept as far as a result may carry it, and the costs it reports."""

    def __init__(self) -> None:
        self.usage = TokenUsage()
        self._output = Output()
        self._pieces: list[str] = []
        self._room = MAX_CONTENT_BYTES + 1
        """One character more than fits shows that there was more."""

    @property
    def content(self) -> str:
        """The text that is kept."""
        return "".join(self._pieces)

    def add(self, piece: Any) -> Iterable[AgentEvent]:
        """Take a piece and return it as events.

        Raises:
            AgentFailed: There is more than any answer takes.
        """
        if type(piece) is str and piece.isascii():
            return self._counted(piece)
        with contain():
            piece = event_in(piece)
        if isinstance(piece, EVENTS) and not isinstance(piece, Done | TextDelta):
            self._output.add(0)
            return events_of(piece)
        with contain():
            text = self._text(piece)
        return self._counted(text)

    def whole(self, value: Any) -> Iterable[AgentEvent]:
        """Take all there is and return it as events; what is too long for a result is not looked at."""
        with contain():
            text = self._text(value[: self._room] if isinstance(value, str) else value)
        return self._kept(text)

    def _text(self, value: Any) -> str:
        """The text of a value, whose costs are added up if it carries any."""
        if type(value) is str:
            return to_text(value)
        if isinstance(value, TextDelta):
            return to_text(value.text)
        if isinstance(value, Answer):
            self._charge(value.token_usage())
            return to_text(value.content)
        if isinstance(value, RunResult):  # of an agent that the function has run
            used = {"prompt_tokens": value.prompt_tokens, "completion_tokens": value.completion_tokens}
            self._charge(Answer("", used, value.usd).token_usage())
            return to_text(value.content)
        if isinstance(value, Done):
            self._charge(usage_in(value))
            return self._last_word(to_text(value.content))
        return to_text(value)

    def _last_word(self, content: str) -> str:
        """Take the content of a Done in the place of the pieces before it; return what of it is still to be added."""
        if not self._pieces:
            return content
        if content.strip():
            self._pieces = [content[: MAX_CONTENT_BYTES + 1]]
            self._room = MAX_CONTENT_BYTES + 1 - len(content)
        return ""

    def _charge(self, usage: TokenUsage) -> None:
        sums = {
            name: total(getattr(self.usage, name), getattr(usage, name) or 0)
            for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        }
        cost = self.usage.estimated_cost + (usage.estimated_cost or 0.0)
        self.usage = replace(usage, **sums, estimated_cost=cost, estimated=self.usage.estimated or usage.estimated)

    def _counted(self, text: str) -> Iterable[TextDelta]:
        self._output.add(len(text))
        return self._kept(text)

    def _kept(self, text: str) -> Iterable[TextDelta]:
        if self._room > 0:
            self._pieces.append(text[: self._room])
            self._room -= len(text)
        return deltas(text)


def as_agent(thing: Any) -> StreamingAgent:
    """Return `thing` if it is an agent, or the agent that a function, or an object with `run(text)`, makes.

    Raises:
        LoomError: It is neither, or could not work; the message names what to write.
    """
    if isinstance(thing, type):
        raise LoomError(f"the class {thing.__name__} is not an agent: give an object of it, {thing.__name__}(…)")
    if isinstance(thing, StreamingAgent):
        check_stream(thing)
        return thing
    if callable(thing):
        return FunctionAgent(thing)
    if callable(run := getattr(thing, "run", None)):
        return FunctionAgent(run, tools=getattr(thing, "tools", ()), name=type(thing).__name__)
    raise LoomError(
        f"a {type(thing).__name__} is not an agent: give a function of one argument, an object with stream(job), "
        "or one with run(text)"
    )
