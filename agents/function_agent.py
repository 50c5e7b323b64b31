"""Agents made of ordinary Python functions."""

import inspect
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from loom.agents.port import StreamingAgent, deltas
from loom.agents.user_code import Opened, call, describe, guarded, text_of
from loom.schemas.errors import AgentFailed, LoomError
from loom.schemas.events import AgentEvent, Done, StepEnd, StepStart
from loom.schemas.run import RunRequest


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
        """Call the function for `job`; whoever listens ends it when the time is up.

        Raises:
            AgentFailed: It raised, or returned nothing.
        """
        started = time.monotonic()
        written: list[str] = []
        yield StepStart(step=1, total_steps=1)
        try:
            with guarded():
                result = await call(self._fn, job.description if self._takes_text else job)
                if hasattr(result, "__aiter__"):
                    async with Opened(result) as pieces:
                        async for piece in pieces:
                            written.append(text_of(piece))
                            for delta in deltas(written[-1]):
                                yield delta
                elif result is not None:
                    written.append(text_of(result))
                    for delta in deltas(written[-1]):
                        yield delta
        except LoomError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise AgentFailed(describe(error), task_id=job.task_id) from error
        content = "".join(written)
        if not content.strip():
            raise AgentFailed(f"{self.name} returned nothing", task_id=job.task_id)
        yield StepEnd(step=1)
        yield Done(content=content, steps=1, duration_ms=(time.monotonic() - started) * 1000)


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
