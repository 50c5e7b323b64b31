"""Models behind OpenAI's chat completions API, at OpenAI or any server that has it.

A fault ends as AgentFailed or DeadlineExceeded, and nothing else:

set-up       a missing key, a proxy that cannot be used: fails at once, `field` names the setting
parameters   a refusal that names an unsupported parameter: asked again at once without it, and remembered
passing      429, 408, 500 and up, no connection, silence, an error in the place of an answer: asked again, three
             times in all, after 1 and 2 s, or after the wait the server asks for, up to `PATIENCE_S`
a long wait  fails at once with `retry_after_s`: the caller can wait without holding a place
final        any other refusal, a quota that is used up, an answer of another form, one that breaks off after its
             first piece
"""

import asyncio
import os
import random
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from loom.agents.deadline import Deadline
from loom.agents.llm.config import AgentConfig
from loom.agents.llm.openai.answers import AnswerReader, BrokeOff, Unreadable
from loom.agents.llm.openai.bodies import BodyReader
from loom.agents.llm.openai.clients import Clients
from loom.agents.llm.openai.compatibility import MAX_MENDS, Compatibility, mended
from loom.agents.llm.openai.endpoints import Endpoint, endpoint_of
from loom.agents.llm.openai.refusals import ErrorReply, Refusal, refusal_of, sentence
from loom.agents.llm.openai.requests import request_of
from loom.agents.user_code import type_name
from loom.bus.logs.logger import get_logger
from loom.schemas.errors import AgentFailed, LoomError
from loom.schemas.llm import CompletionParams, CompletionResult, StreamChunk

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")
Request = dict[str, Any]

TRIES = 3
BACKOFF_S = 1.0
"""Wait before the second try; twice that before the third."""
PATIENCE_S = 5.0
"""Longest wait a server may ask for that is spent here."""
DRAIN_S = 0.5
"""How long the rest of a body is read after the end mark, so that the connection can be used again."""
HTTP_LIBRARIES = frozenset({"httpx", "httpx2", "httpcore", "httpcore2"})
"""What openai's library builds on: those errors come through while a body is read."""

log = get_logger()


@dataclass(frozen=True, kw_only=True)
class _Fault:
    """Why a try failed."""

    error: AgentFailed
    curable: bool
    """Whether another try may help."""
    refusal: Refusal | None = None


class OpenAIProvider:
    """A model reached through the openai library, which is imported and connected on first use.

    What the model does not accept is remembered for as long as the provider lives.

    Args:
        config: The model, its server, and the options of each request; absent: the defaults, with the openai
            library's own `OPENAI_API_KEY` and `OPENAI_BASE_URL`.

    Raises:
        LoomError: What is given is not an AgentConfig.
        AgentFailed: One of these variables holds what cannot be used; `field` names it.
    """

    def __init__(self, config: AgentConfig | None = None) -> None:
        if not isinstance(config, AgentConfig | None):
            raise LoomError(f"a {type(config).__name__} is not a config: write OpenAIProvider(AgentConfig(model=…))")
        self.config = config or AgentConfig()
        self._clients = Clients(self.config.timeout_s, self.config.connect_timeout_s)
        self._compatibility = Compatibility()
        # A missing key is found on first use: the environment may be completed until then.
        self._endpoint = endpoint_of(self.config, os.environ, key_required=False)
        self._complete = False

    async def complete(self, params: CompletionParams) -> CompletionResult:
        """Return the whole answer, trying up to three times while `params.timeout_s` lasts.

        Raises:
            AgentFailed: The model could not be asked; `retry_after_s` where another try may help and its server
                gave a time to wait, `field` where a setting is the cause.
            DeadlineExceeded: `params.timeout_s` ran out.
        """

        async def ask(client: "AsyncOpenAI", request: Request) -> CompletionResult:
            async with aclosing(self._chunks(client, request)) as chunks:
                return _joined([chunk async for chunk in chunks])

        return await self._persist(ask, params, self._deadline(params), stream=False)

    async def stream(self, params: CompletionParams) -> AsyncGenerator[StreamChunk, None]:
        """Yield the answer in pieces; tool calls, usage and finish reason come with the last.

        Tried again only while nothing has been yielded.

        Raises:
            AgentFailed: The model could not be asked (see `complete`), or its answer broke off; then `partial` holds
                the text there is.
            DeadlineExceeded: `params.timeout_s` ran out.
        """
        deadline = self._deadline(params)

        async def begin(client: "AsyncOpenAI", request: Request) -> tuple[StreamChunk, AsyncGenerator[StreamChunk]]:
            chunks = self._chunks(client, request)
            return await anext(chunks), chunks

        first, rest = await self._persist(begin, params, deadline, stream=True)
        async with aclosing(rest), aclosing(deadline.each(rest)) as chunks:
            yield first
            written = [first.text]
            try:
                async for chunk in chunks:
                    written.append(chunk.text)
                    yield chunk
            except LoomError:
                raise
            except Exception as error:  # see _fault: the library lets more than its own errors through
                failure = self._fault(error).error
                broke_off = failure.message if isinstance(error, BrokeOff) else f"{_BROKE_OFF}: {failure.message}"
                raise AgentFailed(broke_off, partial="".join(written), retry_after_s=failure.retry_after_s) from error

    async def aclose(self) -> None:
        """Close the connections of the running event loop; the provider may be used again."""
        await self._clients.aclose()

    async def _chunks(self, client: "AsyncOpenAI", request: Request) -> AsyncGenerator[StreamChunk, None]:
        """Send a request and yield what the body of its answer holds, whether it streams or not."""
        body, answer = BodyReader(), AnswerReader()
        create = client.chat.completions.with_streaming_response.create
        async with (
            create(model=request["model"], messages=[], extra_body=request) as response,
            aclosing(_values(response.iter_bytes(), body, answer)) as values,
        ):
            async for value in values:
                chunk = answer.read(value)
                if chunk is not None:
                    yield chunk
        if answer.reasoning_field == "reasoning_content" and self._compatibility.reasoning_content is None:
            self._compatibility = replace(self._compatibility, reasoning_content=True)
        yield answer.last(ended=body.ended, whole=body.whole)

    async def _persist(
        self,
        ask: "Callable[[AsyncOpenAI, Request], Awaitable[T]]",
        params: CompletionParams,
        deadline: Deadline,
        *,
        stream: bool,
    ) -> T:
        """Ask up to three times, as long as another try may help and there is time to wait for it."""
        tries, mends = 1, 0
        while True:
            request = request_of(self.config, params, self._compatibility, stream=stream)
            try:
                async with deadline.enforced():
                    return await ask(await self._client(), request)
            except LoomError:
                raise
            except Exception as error:  # see _fault: the library lets more than its own errors through
                fault = self._fault(error)
                if mends < MAX_MENDS and self._mend(request, params, fault.refusal, stream=stream):
                    mends += 1
                    continue
                asked = fault.error.retry_after_s
                wait = backoff_s(tries, random.random()) if asked is None else asked  # noqa: S311 - spreads load
                too_long = wait >= deadline.left or (asked is not None and asked > PATIENCE_S)
                if not fault.curable or tries == TRIES or too_long:
                    raise fault.error from error
            log.info("model_asked_again", model=self.config.model, tries=tries, wait_s=wait, reason=fault.error.message)
            await asyncio.sleep(wait)
            tries += 1

    def _mend(self, request: Request, params: CompletionParams, refusal: Refusal | None, *, stream: bool) -> bool:
        """Learn from a refusal; whether the next request differs from the refused one."""
        if refusal is None:
            return False
        if request_of(self.config, params, self._compatibility, stream=stream) != request:
            return True  # another request has met the same refusal meanwhile
        step = mended(self._compatibility, request, refusal)
        if step is None:
            return False
        self._compatibility, name = step
        log.warning("model_refuses_parameter", model=self.config.model, server=self._endpoint.host, parameter=name)
        return request_of(self.config, params, self._compatibility, stream=stream) != request

    async def _client(self) -> "AsyncOpenAI":
        """Return the running loop's client."""
        if not self._complete:
            self._endpoint = endpoint_of(self.config, os.environ)
            self._complete = True
        return await self._clients.get(self._endpoint)

    def _deadline(self, params: CompletionParams) -> Deadline:
        return Deadline(TRIES * self.config.timeout_s if params.timeout_s is None else params.timeout_s)

    def _fault(self, error: Exception) -> _Fault:
        """Return the typed error for an exception that came out of the library or a reader."""
        import openai  # noqa: PLC0415 - slow to import

        reply = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
        if isinstance(reply, ErrorReply):
            status, headers = reply.status_code, reply.headers
            return self._refused(refusal_of(reply.body, status=status, headers=headers, now=time.time()))
        match error:
            case BrokeOff():
                message, curable = f"{_BROKE_OFF}: {self._server} ended the stream before the answer", True
            case _ if isinstance(error, openai.APIConnectionError) or _library(error) in HTTP_LIBRARIES:
                message, curable = self._silence(error), True
            case Unreadable():
                message, curable = f"the answer of {self._server} {error}", False
            case _:
                message, curable = f"the answer of {self._server} could not be read ({type_name(error)})", False
        return _Fault(error=AgentFailed(message), curable=curable)

    def _refused(self, refusal: Refusal) -> _Fault:
        endpoint: Endpoint = self._endpoint
        versioned = endpoint.azure or urlsplit(endpoint.url).path.endswith("/v1")
        message = sentence(refusal, self._server, versioned=versioned, secrets=endpoint.secrets)
        return _Fault(
            error=AgentFailed(message, retry_after_s=refusal.wait_s), curable=refusal.curable, refusal=refusal
        )

    @property
    def _server(self) -> str:
        return f"the model's server at {self._endpoint.host}"

    def _silence(self, error: Exception) -> str:
        """Return how the connection was lost, or not made."""
        kinds = {type(each).__name__ for each in (error, error.__cause__)}
        if "ConnectTimeout" in kinds:
            return f"{self._server} could not be reached within {self.config.connect_timeout_s:g} s"
        if kinds & {"APITimeoutError", "ReadTimeout"}:
            return f"{self._server} sent nothing for {self.config.timeout_s:g} s"
        return f"the connection to {self._server} failed"


_BROKE_OFF = "the model's answer broke off"


def _library(error: Exception) -> str:
    """Return the top-level package that an exception's class is of."""
    return type(error).__module__.partition(".")[0]


def backoff_s(tries: int, jitter: float) -> float:
    """Return how long to wait after so many failed tries: 1 s doubled each time, by `jitter` in [0, 1) ± 25 %."""
    return BACKOFF_S * 2.0 ** (tries - 1) * (0.75 + jitter / 2)


async def _values(pieces: AsyncIterable[bytes], body: BodyReader, answer: AnswerReader) -> AsyncGenerator[Any, None]:
    """Yield the JSON values of a body."""
    source = aiter(pieces)
    try:
        async for data in source:
            for value in body.feed(data):
                yield value
            if body.ended:
                break
    except LoomError:
        raise
    except Exception:  # the library lets more than its own errors through
        if answer.finish_reason is None:
            raise
        # The answer is complete: how its connection ends does not matter.
    if body.ended:
        with suppress(Exception):  # the answer is here
            async with asyncio.timeout(DRAIN_S):
                async for _ in source:
                    pass
    for value in body.rest():
        yield value


def _joined(chunks: list[StreamChunk]) -> CompletionResult:
    last = chunks[-1]
    return CompletionResult(
        content="".join(chunk.text for chunk in chunks),
        reasoning="".join(chunk.reasoning for chunk in chunks),
        refusal="".join(chunk.refusal for chunk in chunks),
        tool_calls=last.tool_calls,
        usage=last.usage,
        finish_reason=last.finish_reason,
    )
