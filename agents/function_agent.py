"""Agents made of ordinary Python functions."""

import inspect
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any

from loom.agents.port import Output, StreamingAgent, deltas, raised
from loom.agents.user_code import NotText, Opened, call, guarded, text_of
from loom.schemas.errors import AgentFailed, LoomError
from loom.schemas.events import AgentEvent, Done, StepEnd, StepStart, TextDelta
from loom.schemas.run import RunRequest
from loom.schemas.wire import MAX_CONTENT_BYTES


class FunctionAgent:
    """A function as an agent: async, sync (runs in a thread), or an async generator of text pieces.

    Args:
        fn: Takes the description, if its parameter is annotated `str` or named `description`, else the RunRequest.
            Returns text, or anything JSON can carry.
        tools: Names of the tools it claims to have, for bids.

    Raises:
        LoomError: `fn` does not take exactly one argument.
    """

    def __init__(self, fn: Callable[..., Any], *, tools: Sequence[str] = ()) -> None:
        self.name: str = getattr(fn, "__name__", type(fn).__name__)
        self.tools = tuple(tools)
        self._fn = fn
        self._takes_text = _takes_text(fn, self.name)

    async def stream(self, job: RunRequest) -> AsyncGenerator[AgentEvent, None]:
        """Call the function for `job`; the caller ends it when the time is up.

        Raises:
            AgentFailed: It raised, returned nothing or what is no text, or yielded text without end.
        """
        started = time.monotonic()
        written = _Written()
        yield StepStart(step=1, total_steps=1)
        try:
            result = await call(self._fn, job.description if self._takes_text else job)
            with guarded():
                streams = hasattr(result, "__aiter__")
            if streams:
                async with Opened(result) as pieces:
                    async for piece in pieces:
                        for delta in written.add(piece):
                            yield delta
            elif result is not None:
                for delta in written.whole(result):
                    yield delta
        except LoomError:
            raise
        except NotText as error:
            raise AgentFailed(f"{self.name} gave no text: {error}", task_id=job.task_id) from error
        except Exception as error:  # a user's function may raise anything
            raise raised(error, job) from error
        if not written.content.strip():
            raise AgentFailed(f"{self.name} returned nothing", task_id=job.task_id)
        yield StepEnd(step=1)
        yield Done(content=written.content, steps=1, duration_ms=(time.monotonic() - started) * 1000)


class _Written:
    """What a function has written, kept as far as a result may carry it."""

    def __init__(self) -> None:
        self._output = Output()
        self._pieces: list[str] = []
        self._room = MAX_CONTENT_BYTES + 1
        """One character more than fits shows that there was more."""

    @property
    def content(self) -> str:
        """The text that is kept."""
        return "".join(self._pieces)

    def add(self, piece: Any) -> Iterable[TextDelta]:
        """Take a piece and return it as events.

        Raises:
            AgentFailed: There is more than any answer takes.
        """
        if type(piece) is str and piece.isascii():
            text = piece
        else:
            with guarded():
                text = text_of(piece)
        self._output.add(len(text))
        return self._kept(text)

    def whole(self, value: Any) -> Iterable[TextDelta]:
        """Take all there is and return it as events; what is too long for a result is not looked at."""
        with guarded():
            text = text_of(value[: self._room] if isinstance(value, str) else value)
        return self._kept(text)

    def _kept(self, text: str) -> Iterable[TextDelta]:
        if self._room > 0:
            self._pieces.append(text[: self._room])
            self._room -= len(text)
        return deltas(text)


def as_agent(thing: Any) -> StreamingAgent:
    """Return `thing` if it is an agent, or the agent a function makes.

    Raises:
        LoomError: It is neither.
    """
    if not isinstance(thing, type):
        if isinstance(thing, StreamingAgent):
            return thing
        if callable(thing):
            return FunctionAgent(thing)
    what = f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"
    raise LoomError(f"{what} is not an agent: give an object with stream(job), or a function of one argument")


def _takes_text(fn: Callable[..., Any], name: str) -> bool:
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError) as error:
        raise LoomError(f"{name} hides its parameters: wrap it in a def") from error
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not positional or len(required) > 1 or (required and required[0].kind is inspect.Parameter.KEYWORD_ONLY):
        raise LoomError(f"{name} must take one argument: the description (annotated str) or the RunRequest")
    # A module with postponed annotations has them as text.
    return positional[0].annotation in (str, "str") or positional[0].name == "description"
