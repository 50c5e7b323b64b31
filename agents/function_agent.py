"""Agents made from Python functions."""

import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable, Sequence
from typing import Any

from msgspec.structs import replace

from loom.agents.job import Answer, Job
from loom.agents.protocol import Output, StreamingAgent, raised, usage_in
from loom.agents.signatures import check_stream, name_of, takes_text
from loom.agents.threaded import ThreadedIteration
from loom.agents.user_code import ClosingIterator, UserFunction, contain
from loom.agents.values import NotText, to_text
from loom.agents.yielded_values import EVENTS, ONLY_STEP_ENDS, ONLY_STEP_STARTS, deltas, event_in, events_of
from loom.schemas.base import MAX_CONTENT_BYTES, total
from loom.schemas.errors import AgentFailed, LoomError
from loom.schemas.events import AgentEvent, Done, TextDelta, TokenUsage
from loom.schemas.run import RunRequest
from loom.schemas.task import RunResult

NO_USAGE = TokenUsage()
"""Usage of a function that reports no costs in its values."""


class FunctionAgent:
    """Makes an agent from a function, which may be async or sync (run in a thread), or a generator of either kind.

    Args:
        fn: Takes the text of the task or the job. It gets the job if its parameter is annotated with RunRequest or
            Job, or has no annotation and the name job, request, req or run. It returns text, a JSON value or an
            `Answer`; a generator yields these, events, or mappings with the `type` of an event.
        tools: Names of the tools to list in bids.
        name: Name in logs and errors; default: the function's name.

    Raises:
        LoomError: `fn` does not take exactly one argument, or its argument is neither text nor a job.
    """

    def __init__(self, fn: Callable[..., Any], *, tools: Sequence[str] = (), name: str | None = None) -> None:
        self.name = name or name_of(fn)
        self.tools = tuple(tools)
        self._fn = UserFunction(fn)
        self._takes_text = takes_text(fn)

    async def stream(self, job: RunRequest) -> AsyncGenerator[AgentEvent, None]:
        """Call the function for `job`; the caller enforces the deadline.

        Raises:
            AgentFailed: The function raised, returned nothing or a value that is not text, or yielded endless text.
        """
        started = time.monotonic()
        written = _CollectedText()
        yield ONLY_STEP_STARTS
        try:
            job = job if isinstance(job, Job) else Job.of(job)
            result = await self._fn.call(job.description if self._takes_text else job)
            source = _async_iterable(result)
            if source is not None:
                async with ClosingIterator(source) as pieces:
                    async for piece in pieces:
                        for event in written.add(piece):
                            yield event
            elif result is not None:
                for event in written.add_returned(result):
                    yield event
        except LoomError as error:
            written.add_to(error)
            raise
        except NotText as error:
            raise AgentFailed(f"{self.name} did not return text: {error}", task_id=job.task_id) from error
        except Exception as error:  # a function of a user may raise anything
            raise raised(error, job) from error
        if not written.content.strip():
            raise AgentFailed(f"{self.name} returned nothing", task_id=job.task_id)
        yield ONLY_STEP_ENDS
        duration_ms = (time.monotonic() - started) * 1000
        yield Done(content=written.content, steps=1, duration_ms=duration_ms, usage=written.usage)


def _async_iterable(result: Any) -> AsyncIterable[Any] | None:
    """Return the async iterable of a generator's result, or None for an answer that was returned."""
    if type(result) is str:
        return None
    with contain():
        if isinstance(result, Generator):
            return ThreadedIteration(result)
        return result if hasattr(result, "__aiter__") else None


class _CollectedText:
    """Collects the text of a function, up to the size limit of a result, and the costs in its values."""

    def __init__(self) -> None:
        self.usage = NO_USAGE
        self._output = Output()
        self._pieces: list[str] = []
        self._chars_left = MAX_CONTENT_BYTES + 1
        """Characters that are still kept: one more than a result can hold, which shows that the text is too long."""

    @property
    def content(self) -> str:
        """The collected text."""
        return "".join(self._pieces)

    def add_to(self, error: LoomError) -> None:
        """Add the text and its costs to the error of the function, unless it has its own."""
        content = self.content
        if content and getattr(error, "spent", None) is None:
            vars(error)["spent"] = Done(content=content, usage=self.usage)

    def add(self, piece: Any) -> Iterable[AgentEvent]:
        """Add a yielded value and return it as events.

        Raises:
            AgentFailed: The output is endless.
        """
        if type(piece) is str and piece.isascii():
            return self._add_counted(piece)
        with contain():
            piece = event_in(piece)
        if isinstance(piece, EVENTS) and not isinstance(piece, Done | TextDelta):
            self._output.add(0)
            return events_of(piece)
        with contain():
            text = self._text(piece)
        return self._add_counted(text)

    def add_returned(self, value: Any) -> Iterable[AgentEvent]:
        """Add a returned value and return it as events; text beyond the size limit is not converted."""
        if type(value) is str:
            return self._keep(to_text(value[: self._chars_left]))
        with contain():
            text = self._text(value[: self._chars_left] if isinstance(value, str) else value)
        return self._keep(text)

    def _text(self, value: Any) -> str:
        """Return the text of a value, and add its costs."""
        if type(value) is str:
            return to_text(value)
        if isinstance(value, TextDelta):
            return to_text(value.text)
        if isinstance(value, Answer):
            self._add_usage(value.token_usage())
            return to_text(value.content)
        if isinstance(value, RunResult):  # from an agent that the function has run
            used = {"prompt_tokens": value.prompt_tokens, "completion_tokens": value.completion_tokens}
            self._add_usage(Answer("", used, value.usd).token_usage())
            return to_text(value.content)
        if isinstance(value, Done):
            self._add_usage(usage_in(value))
            return self._replace_by_done(to_text(value.content))
        return to_text(value)

    def _replace_by_done(self, content: str) -> str:
        """Replace the collected text by the content of a Done; return the text that is still to be added."""
        if not self._pieces:
            return content
        if content.strip():
            self._pieces = [content[: MAX_CONTENT_BYTES + 1]]
            self._chars_left = MAX_CONTENT_BYTES + 1 - len(content)
        return ""

    def _add_usage(self, usage: TokenUsage) -> None:
        sums = {
            name: total(getattr(self.usage, name), getattr(usage, name) or 0)
            for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        }
        cost = self.usage.estimated_cost + (usage.estimated_cost or 0.0)
        self.usage = replace(usage, **sums, estimated_cost=cost, estimated=self.usage.estimated or usage.estimated)

    def _add_counted(self, text: str) -> Iterable[TextDelta]:
        self._output.add(len(text))
        return self._keep(text)

    def _keep(self, text: str) -> Iterable[TextDelta]:
        if self._chars_left > 0:
            self._pieces.append(text[: self._chars_left])
            self._chars_left -= len(text)
        return deltas(text)


def as_agent(thing: Any) -> StreamingAgent:
    """Return an agent unchanged, or make one from a function or from an object with `run(text)`.

    Raises:
        LoomError: The object cannot be used as an agent; the message names the form it must have.
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
