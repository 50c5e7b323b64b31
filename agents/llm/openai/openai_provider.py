"""A provider for models with OpenAI's chat completions API, at OpenAI or at a compatible server.

Every fault raises AgentFailed or DeadlineExceeded:

- Setup: a missing key or an unusable proxy fails at once; `field` names the setting.
- Parameters: a request refused for an unsupported parameter is repeated at once without it, and so are later ones.
- Temporary: status 408, 429, 500 and above, a lost connection, silence, or an error instead of an answer.
  The request is tried three times in all, after 1 and 2 s, or after the server's `Retry-After` up to `PATIENCE_S`.
- Long waits: a longer `Retry-After` fails at once with `retry_after_s`, so that the caller can wait without a slot.
- Final: any other refusal, an exhausted quota, an unknown format, or an answer that breaks off after its first piece.
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
from loom.agents.llm.openai.compatibility import MAX_ADAPTATIONS, Compatibility, adapt
from loom.agents.llm.openai.endpoints import Endpoint, endpoint_of
from loom.agents.llm.openai.refusals import ErrorReply, Refusal, refusal_message, refusal_of
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
"""Seconds before the second try; twice as many before the third."""
PATIENCE_S = 5.0
"""Longest `Retry-After` after which the request is tried again."""
DRAIN_S = 0.5
"""Seconds for reading the rest of a body after the end mark, so that the connection can be reused."""
HTTP_LIBRARIES = frozenset({"httpx", "httpx2", "httpcore", "httpcore2"})
"""HTTP libraries below the openai library, whose errors pass through it while a body is read."""

log = get_logger()


@dataclass(frozen=True, kw_only=True)
class _Fault:
    """The reason of a failed try."""

    error: AgentFailed
    retryable: bool
    """Whether another try may succeed."""
    refusal: Refusal | None = None


class OpenAIProvider:
    """Requests answers through the openai library, which is imported and connected on first use.

    Parameters that the model refuses are left out of all later requests of the provider.

    Args:
        config: The model, its server and the options of each request. Default: the environment variables
            `OPENAI_API_KEY` and `OPENAI_BASE_URL`, and the defaults of AgentConfig.

    Raises:
        LoomError: The config is not an AgentConfig.
        AgentFailed: An environment variable has an invalid value; `field` names the variable.
    """

    def __init__(self, config: AgentConfig | None = None) -> None:
        if not isinstance(config, AgentConfig | None):
            raise LoomError(f"a {type(config).__name__} is not a config: write OpenAIProvider(AgentConfig(model=…))")
        self.config = config or AgentConfig()
        self._clients = Clients(self.config.timeout_s, self.config.connect_timeout_s)
        self._compatibility = Compatibility()
        # A missing key raises on first use, because the environment may be completed until then.
        self._endpoint = endpoint_of(self.config, os.environ, key_required=False)
        self._complete = False

    async def complete(self, params: CompletionParams) -> CompletionResult:
        """Return the whole answer, after up to three tries within `params.timeout_s`.

        Raises:
            AgentFailed: The request failed. `retry_after_s` has the wait that the server asks for, `field` the setting
                that is the cause.
            DeadlineExceeded: `params.timeout_s` ran out.
        """

        async def complete_once(client: "AsyncOpenAI", request: Request) -> CompletionResult:
            async with aclosing(self._chunks(client, request)) as chunks:
                return _joined([chunk async for chunk in chunks])

        return await self._with_retries(complete_once, params, self._deadline(params), stream=False)

    async def stream(self, params: CompletionParams) -> AsyncGenerator[StreamChunk, None]:
        """Yield the answer in pieces; the last one has the tool calls, the usage and the finish reason.

        The request is tried again only before the first piece.

        Raises:
            AgentFailed: The request failed (see `complete`), or the answer broke off: `partial` has its text.
            DeadlineExceeded: `params.timeout_s` ran out.
        """
        deadline = self._deadline(params)

        async def start_stream(
            client: "AsyncOpenAI", request: Request
        ) -> tuple[StreamChunk, AsyncGenerator[StreamChunk]]:
            chunks = self._chunks(client, request)
            return await anext(chunks), chunks

        first, rest = await self._with_retries(start_stream, params, deadline, stream=True)
        async with aclosing(rest), aclosing(deadline.each(rest)) as chunks:
            yield first
            written = [first.text]
            try:
                async for chunk in chunks:
                    written.append(chunk.text)
                    yield chunk
            except LoomError:
                raise
            except Exception as error:  # the library also raises errors of other packages
                failure = self._fault(error).error
                broke_off = failure.message if isinstance(error, BrokeOff) else f"{_BROKE_OFF}: {failure.message}"
                raise AgentFailed(broke_off, partial="".join(written), retry_after_s=failure.retry_after_s) from error

    async def aclose(self) -> None:
        """Close the connections of the running event loop; the provider can be used again."""
        await self._clients.aclose()

    async def _chunks(self, client: "AsyncOpenAI", request: Request) -> AsyncGenerator[StreamChunk, None]:
        """Send a request and yield the chunks of its response, streamed or not."""
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

    async def _with_retries(
        self,
        send: "Callable[[AsyncOpenAI, Request], Awaitable[T]]",
        params: CompletionParams,
        deadline: Deadline,
        *,
        stream: bool,
    ) -> T:
        """Send a request up to three times, while another try may succeed and there is time for it."""
        tries, adaptations = 1, 0
        while True:
            request = request_of(self.config, params, self._compatibility, stream=stream)
            try:
                async with deadline.enforced():
                    return await send(await self._client(), request)
            except LoomError:
                raise
            except Exception as error:  # the library also raises errors of other packages
                fault = self._fault(error)
                if adaptations < MAX_ADAPTATIONS and self._adapt(request, params, fault.refusal, stream=stream):
                    adaptations += 1
                    continue
                retry_after_s = fault.error.retry_after_s
                jitter = random.random()  # noqa: S311 - spreads load
                wait = backoff_s(tries, jitter) if retry_after_s is None else retry_after_s
                too_long = wait >= deadline.left or (retry_after_s is not None and retry_after_s > PATIENCE_S)
                if not fault.retryable or tries == TRIES or too_long:
                    raise fault.error from error
            log.info(
                "model_request_retried", model=self.config.model, tries=tries, wait_s=wait, reason=fault.error.message
            )
            await asyncio.sleep(wait)
            tries += 1

    def _adapt(self, request: Request, params: CompletionParams, refusal: Refusal | None, *, stream: bool) -> bool:
        """Adapt later requests to a refusal; return whether the next request differs from the refused one."""
        if refusal is None:
            return False
        if request_of(self.config, params, self._compatibility, stream=stream) != request:
            return True  # a concurrent request got the same refusal
        step = adapt(self._compatibility, request, refusal)
        if step is None:
            return False
        self._compatibility, name = step
        log.warning("model_refuses_parameter", model=self.config.model, server=self._endpoint.host, parameter=name)
        return request_of(self.config, params, self._compatibility, stream=stream) != request

    async def _client(self) -> "AsyncOpenAI":
        """Return the client of the running event loop."""
        if not self._complete:
            self._endpoint = endpoint_of(self.config, os.environ)
            self._complete = True
        return await self._clients.get(self._endpoint)

    def _deadline(self, params: CompletionParams) -> Deadline:
        return Deadline(TRIES * self.config.timeout_s if params.timeout_s is None else params.timeout_s)

    def _fault(self, error: Exception) -> _Fault:
        """Return the fault for an exception of the openai library or of a reader."""
        import openai  # noqa: PLC0415 - slow to import

        reply = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
        if isinstance(reply, ErrorReply):
            status, headers = reply.status_code, reply.headers
            return self._refused(refusal_of(reply.body, status=status, headers=headers, now=time.time()))
        match error:
            case BrokeOff():
                message, retryable = f"{_BROKE_OFF}: {self._server} ended the stream before the answer", True
            case _ if isinstance(error, openai.APIConnectionError) or _library(error) in HTTP_LIBRARIES:
                message, retryable = self._silence(error), True
            case Unreadable():
                message, retryable = f"the answer of {self._server} {error}", False
            case _:
                message, retryable = f"the answer of {self._server} could not be read ({type_name(error)})", False
        return _Fault(error=AgentFailed(message), retryable=retryable)

    def _refused(self, refusal: Refusal) -> _Fault:
        endpoint: Endpoint = self._endpoint
        versioned = endpoint.azure or urlsplit(endpoint.url).path.endswith("/v1")
        message = refusal_message(refusal, self._server, versioned=versioned, secrets=endpoint.secrets)
        return _Fault(
            error=AgentFailed(message, retry_after_s=refusal.wait_s), retryable=refusal.retryable, refusal=refusal
        )

    @property
    def _server(self) -> str:
        return f"the model's server at {self._endpoint.host}"

    def _silence(self, error: Exception) -> str:
        """Return how the connection failed."""
        kinds = {type(cause).__name__ for cause in (error, error.__cause__)}
        if "ConnectTimeout" in kinds:
            return f"{self._server} could not be reached within {self.config.connect_timeout_s:g} s"
        if kinds & {"APITimeoutError", "ReadTimeout"}:
            return f"{self._server} sent nothing for {self.config.timeout_s:g} s"
        return f"the connection to {self._server} failed"


_BROKE_OFF = "the model's answer broke off"


def _library(error: Exception) -> str:
    """Return the top-level package of an exception's class."""
    return type(error).__module__.partition(".")[0]


def backoff_s(tries: int, jitter: float) -> float:
    """Return the seconds to wait before the next try.

    Args:
        tries: Number of failed tries, from 1: the wait is 1 s, and doubles with each try.
        jitter: From [0, 1), changes the wait by up to 25 % in each direction.
    """
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
    except Exception:  # the library also raises errors of other packages
        if answer.finish_reason is None:
            raise
        # The answer is complete, so that the error of the connection is ignored.
    if body.ended:
        with suppress(Exception):  # the answer is complete
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
