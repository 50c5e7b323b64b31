"""The objects accepted as agents, and their arguments."""

import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, Literal, Optional, Protocol, TypedDict, TypeVar

import pytest

from loom import Job
from loom.agents.function_agent import as_agent
from loom.agents.protocol import collect
from loom.agents.signatures import takes_text
from loom.schemas.errors import AgentFailed, LoomError
from loom.schemas.events import Done, ReasoningDelta, TextDelta, TokenUsage
from loom.schemas.run import RunRequest

JOB = RunRequest(task_id="t1", description="count to 3", remaining_s=10)


def named(text: Annotated[str, "doc"], extra: int = 0) -> str:
    return text


def defaulted(depth: int = 0, *, text: str = "") -> str:
    return text


def optional(text: str | None) -> str:
    return text or ""


def optional_by_name(text: Optional[Annotated[str, "doc"]]) -> str:  # noqa: UP045 - the older spelling
    return text or ""


def postponed(text: "str | None") -> str:
    return text or ""


def unfound(text: "str | Missing") -> str:  # type: ignore[name-defined]  # noqa: F821
    return str(text)


def untyped(x):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    return x


def anything(x: Any) -> Any:
    return x


class Words(str):
    __slots__ = ()


def subclass(text: Words) -> str:
    return text


@pytest.mark.parametrize(
    "fn",
    [
        named,
        optional,
        optional_by_name,
        postponed,
        unfound,
        untyped,
        anything,
        subclass,
        str.upper,
        len,
        functools.partial(named, extra=1),
        functools.lru_cache(untyped),
        lambda *args: args[0],
        lambda task: task,
    ],
)
def test_an_argument_for_text_gets_the_text(fn: Callable[..., Any]) -> None:
    assert takes_text(fn)


def annotated(x: RunRequest) -> str:
    return x.description


def with_report(x: Job) -> str:
    return x.description


def either(x: RunRequest | str) -> str:
    return x if isinstance(x, str) else x.description


def postponed_job(x: "RunRequest") -> str:
    return x.description


@pytest.mark.parametrize(
    "fn",
    [
        annotated,
        with_report,
        either,
        postponed_job,
        lambda job: job,
        lambda request: request,
        lambda req: req,
        lambda run: run,
    ],
)
async def test_an_argument_for_the_job_gets_the_job(fn: Callable[..., Any]) -> None:
    assert not takes_text(fn)


@pytest.mark.parametrize("fn", [lambda: 1, lambda a, b: 1, lambda *, text: 1, lambda **facts: 1, max])  # noqa: ARG005
def test_a_function_that_cannot_take_one_argument_is_refused(fn: Callable[..., Any]) -> None:
    with pytest.raises(LoomError, match=r"must take one argument|hides its parameters"):
        as_agent(fn)


@dataclass
class Question:
    text: str


class Fields(TypedDict):
    text: str


class Named(Protocol):
    description: str


class OwnJob(Job, frozen=True, kw_only=True):
    """A job class of a user."""


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        (int, "int"),
        (dict[str, Any], r"dict\[str, Any\]"),
        (bytes, "bytes"),
        (int | None, r"int \| None"),
        (Question, "Question"),
        (Fields, "Fields"),
        (Literal["a"], "Literal"),
        (None, "None"),
    ],
)
def test_a_function_that_wants_neither_text_nor_a_job_is_refused(kind: Any, shown: str) -> None:
    def wants(x):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        return x

    wants.__annotations__["x"] = kind
    with pytest.raises(LoomError, match=f"wants takes a {shown}.*str for the text of the task, or with Job"):
        as_agent(wants)


@pytest.mark.parametrize("kind", [object, Named, OwnJob, RunRequest | int, "Unfound", TypeVar("T")])
def test_an_ambiguous_argument_gets_the_job(kind: Any) -> None:
    def wants(x):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        return x

    wants.__annotations__["x"] = kind
    assert not takes_text(wants)


class Speaker:
    async def __call__(self, text: str) -> str:
        return text + self.where()

    async def pieces(self, text: str) -> AsyncIterator[str]:
        yield text
        yield self.where()

    def sync_pieces(self, text: str) -> Iterator[str]:
        yield text
        yield self.where()

    def sync(self, text: str) -> str:
        return text + self.where()

    async def twice(self, text: str) -> Any:
        return self(text)

    @staticmethod
    def where() -> str:
        return "" if threading.current_thread() is threading.main_thread() else " in a thread"


SPEAKER = Speaker()


@pytest.mark.parametrize(
    ("thing", "where"),
    [
        (SPEAKER, ""),
        (SPEAKER.pieces, ""),
        (SPEAKER.sync_pieces, " in a thread"),
        (SPEAKER.sync, " in a thread"),
        (SPEAKER.twice, ""),
        (functools.partial(SPEAKER.pieces), ""),
        (functools.partial(SPEAKER.sync_pieces), " in a thread"),
        (functools.partial(SPEAKER), ""),
        (lambda text: SPEAKER(text.strip()), ""),
        (lambda text: SPEAKER.pieces(text.strip()), ""),
    ],
)
async def test_every_kind_of_callable_works(thing: Any, where: str) -> None:
    assert (await collect(as_agent(thing), JOB)).content == f"count to 3{where}"


async def test_a_function_may_yield_events_among_its_text() -> None:
    async def steps(text: str) -> AsyncIterator[Any]:
        yield TextDelta(text=text)
        yield Done(content=text, steps=1)

    assert (await collect(as_agent(steps), JOB)).content == "count to 3"


@pytest.mark.parametrize(
    ("items", "content"),
    [
        (("draft", Done(content="final")), "final"),
        (("draft", {"type": "done", "content": {"a": 1}}), '{"a":1}'),
        (("draft", Done(usage=TokenUsage(prompt_tokens=1))), "draft"),
        ((Done(content="all of it"),), "all of it"),
    ],
)
async def test_a_done_event_overrides_the_text_of_a_function(items: tuple[Any, ...], content: str) -> None:
    def pieces(text: str) -> Iterator[Any]:
        yield from items

    assert (await collect(as_agent(pieces), JOB)).content == content


async def test_a_done_longer_than_a_result_is_cut() -> None:
    def pieces(text: str) -> Iterator[Any]:
        yield text
        yield Done(content="x" * 100_000)

    result = await collect(as_agent(pieces), JOB)
    assert result.truncated
    assert set(result.content) == {"x"}


async def test_a_function_may_yield_mappings_with_the_type_of_an_event_among_its_text() -> None:
    events: list[Any] = []

    async def report(event: Any) -> None:
        events.append(event)

    def steps(text: str) -> Iterator[Any]:
        yield {"type": "reasoning_delta", "text": "hm"}
        yield {"type": "text_delta", "text": text}
        yield {"type": "greeting"}
        yield {"type": ["unhashable"]}
        yield {"type": "done", "usage": {"prompt_tokens": 3}}

    result = await collect(as_agent(steps), JOB, report)

    assert result.content == 'count to 3{"type":"greeting"}{"type":["unhashable"]}'
    assert result.prompt_tokens == 3
    assert ReasoningDelta(text="hm") in events


async def test_a_mapping_with_a_field_of_the_wrong_type_fails_the_run_of_a_function() -> None:
    def steps(text: str) -> Iterator[Any]:
        yield {"type": "step_start", "step": "one"}

    with pytest.raises(AgentFailed, match="yielded a mapping of type step_start that cannot be sent"):
        await collect(as_agent(steps), JOB)


async def test_an_object_with_run_alone_is_an_agent() -> None:
    class Runs:
        tools = ("search",)

        async def run(self, input_text):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            return f"ran {input_text}"

    agent = as_agent(Runs())

    assert (await collect(agent, JOB)).content == "ran count to 3"
    assert (agent.tools, agent.name) == (("search",), "Runs")  # type: ignore[attr-defined]


class SyncStream:
    def stream(self, job: RunRequest) -> Iterator[Any]:  # noqa: ARG002
        yield Done(content="x")


class CoroutineStream:
    async def stream(self, job: RunRequest) -> Any:
        return job


class TwoArguments:
    async def stream(self, job: RunRequest, extra: int) -> AsyncIterator[Any]:  # noqa: ARG002
        yield Done(content="x")


class KeywordOnly:
    async def stream(self, *, job: RunRequest) -> AsyncIterator[Any]:  # noqa: ARG002
        yield Done(content="x")


class Graph:
    """As a compiled graph of langgraph, and any Runnable of LangChain."""

    def stream(self, input: Any, config: Any = None, *, stream_mode: str = "values") -> Iterator[Any]:  # noqa: A002, ARG002
        yield input

    async def astream(self, input: Any, config: Any = None) -> AsyncIterator[Any]:  # noqa: A002, ARG002
        yield input

    async def ainvoke(self, input: Any, config: Any = None) -> Any:  # noqa: A002, ARG002
        return input


class NotAMethod:
    stream = "no"


@pytest.mark.parametrize(
    ("thing", "sentence"),
    [
        (SyncStream(), "is a sync generator: make it `async def stream"),
        (CoroutineStream(), "is a coroutine: it must yield and not return"),
        (TwoArguments(), "must take one argument, the job"),
        (KeywordOnly(), "must take one argument, the job"),
        (Graph(), "LangChain or LangGraph object.*`async def answer"),
        (NotAMethod(), "is not a method"),
        (Speaker, r"the class Speaker is not an agent: give an object of it, Speaker\(…\)"),
        ("hi", "a str is not an agent"),
        (ModuleType("m"), "a module is not an agent"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_unusable_function_is_refused_with_the_fix(thing: Any, sentence: str) -> None:
    with pytest.raises(LoomError, match=sentence):
        as_agent(thing)


async def test_an_exception_of_an_object_with_stream_is_published_as_that_of_a_function() -> None:
    class Raises:
        async def stream(self, job: RunRequest) -> AsyncIterator[Any]:  # noqa: ARG002
            yield TextDelta(text="x")
            raise ValueError("a secret")

    def raises(text: str) -> str:
        raise ValueError("a secret")

    for thing in (Raises(), raises):
        with pytest.raises(AgentFailed) as caught:
            await collect(as_agent(thing), JOB)
        assert caught.value.message == "the agent raised ValueError"
