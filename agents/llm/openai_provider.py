"""Models behind OpenAI's chat completions API, at OpenAI or anywhere that speaks it.

A fault ends as AgentFailed or DeadlineExceeded, and nothing else:

passing      429, 408, 500 and up, no connection, silence, an error in the place of an answer: asked again, three
             times in all, after 1 and 2 s, or after the wait the server asks for, up to `PATIENCE_S`
a long wait  fails at once with `retry_after_s`: whoever called can wait without holding a place
final        any other refusal, an answer of another form, one that breaks off after its first piece
"""

import asyncio
import importlib
import os
import random
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from email.utils import parsedate_to_datetime
from itertools import count
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from loom.agents.deadline import Deadline
from loom.agents.llm.config import AgentConfig
from loom.agents.llm.usage import usage_of
from loom.agents.user_code import text_of
from loom.bus.log import get_logger
from loom.bus.redaction import redact
from loom.schemas.errors import AgentFailed, LoomError
from loom.schemas.llm import CompletionParams, CompletionResult, Message, StreamChunk, ToolCall, ToolDefinition

if TYPE_CHECKING:
    from openai import APIError, APIStatusError, AsyncOpenAI

T = TypeVar("T")

TRIES = 3
BACKOFF_S = 1.0
"""Wait before the second try; twice that before the third."""
PATIENCE_S = 5.0
"""Longest wait a server may ask for that is spent here."""
SILENCE_S = 60.0
"""How long a server may say nothing before a try is given up."""
CONNECT_S = 10.0
LIMIT_S = TRIES * SILENCE_S
"""How long all tries may take together when the question sets no limit."""
MAX_REASON_CHARS = 300
HTTP_LIBRARIES = frozenset({"httpx", "httpx2"})
"""What openai's library builds on: versions of it let those errors through while a stream is read."""
OPENAI_URL = "https://api.openai.com/v1"
REFUSES_ACCESS = frozenset({401, 403})
SERVER_ERROR = 500
TRY_AGAIN = frozenset({408, 429})
"""With all from 500 up: what another try may cure."""

log = get_logger()


class OpenAIProvider:
    """A model reached through the openai library, which is imported and connected on first use.

    Args:
        config: `model`, `api_key` and `base_url` count; absent, the last two are the openai library's own
            `OPENAI_API_KEY` and `OPENAI_BASE_URL`.
    """

    def __init__(self, config: AgentConfig | None = None) -> None:
        self._config = config or AgentConfig()
        self._clients: dict[asyncio.AbstractEventLoop, tuple[AsyncGenerator[AsyncOpenAI, None], AsyncOpenAI]] = {}

    async def complete(self, params: CompletionParams) -> CompletionResult:
        """Return the whole answer, trying up to three times while `params.timeout_s` lasts.

        Raises:
            AgentFailed: The model could not be asked; `retry_after_s` where another try may help and its server said
                how long to wait.
            DeadlineExceeded: `params.timeout_s` ran out.
        """

        async def ask(client: "AsyncOpenAI") -> CompletionResult:
            reply = await client.chat.completions.create(**self._request(params), stream=False)
            choice = reply.choices[0]
            calls = _Calls()
            calls.add(choice.message.tool_calls or ())
            return CompletionResult(
                content=choice.message.content or "",
                tool_calls=calls.whole(),
                usage=usage_of(reply.usage),
                finish_reason=choice.finish_reason,
            )

        return await self._persist(ask, _deadline(params))

    async def stream(self, params: CompletionParams) -> AsyncGenerator[StreamChunk, None]:
        """Yield the answer in pieces; tool calls, usage and finish reason come with the last.

        Tried again only while nothing has been yielded.

        Raises:
            AgentFailed: The model could not be asked (see `complete`), or its answer broke off.
            DeadlineExceeded: `params.timeout_s` ran out.
        """
        deadline = _deadline(params)

        async def begin(client: "AsyncOpenAI") -> tuple[StreamChunk, AsyncGenerator[StreamChunk, None]]:
            chunks = self._chunks(client, params)
            return await anext(chunks), chunks

        first, rest = await self._persist(begin, deadline)
        async with aclosing(rest), aclosing(deadline.each(rest)) as chunks:
            yield first
            try:
                async for chunk in chunks:
                    yield chunk
            except LoomError:
                raise
            except Exception as error:  # see _failure: the library lets more than its own errors through
                failure, _ = self._failure(error)
                raise AgentFailed(f"the model's answer broke off: {failure.message}", **failure.facts) from error

    async def aclose(self) -> None:
        """Close the connections of the running event loop; the provider may be used again."""
        lifetime, _ = self._clients.pop(asyncio.get_running_loop(), (None, None))
        if lifetime is not None:
            await lifetime.aclose()

    async def _chunks(self, client: "AsyncOpenAI", params: CompletionParams) -> AsyncGenerator[StreamChunk, None]:
        source = await client.chat.completions.create(
            **self._request(params), stream=True, stream_options={"include_usage": True}
        )
        calls, usage, reason = _Calls(), None, None
        try:
            async for event in source:
                usage = usage_of(event.usage) or usage
                for choice in event.choices:  # none in the event that tells the usage
                    reason = choice.finish_reason or reason
                    calls.add(choice.delta.tool_calls or ())
                    if choice.delta.content:
                        yield StreamChunk(text=choice.delta.content)
        finally:
            await source.close()
        if reason is None:
            raise AgentFailed("the model's answer broke off: its stream ended without a finish_reason")
        yield StreamChunk(tool_calls=calls.whole(), usage=usage, finish_reason=reason)

    async def _persist(self, ask: "Callable[[AsyncOpenAI], Awaitable[T]]", deadline: Deadline) -> T:
        """Ask up to three times, as long as another try may help and there is time to wait for it."""
        for tries in count(1):
            try:
                async with deadline.enforced():
                    return await ask(await self._client())
            except LoomError:
                raise
            except Exception as error:  # see _failure: the library lets more than its own errors through
                failure, curable = self._failure(error)
                asked = failure.retry_after_s
                wait = backoff_s(tries, random.random()) if asked is None else asked  # noqa: S311 - spreads load
                too_long = wait >= deadline.left or (asked is not None and asked > PATIENCE_S)
                if not curable or tries == TRIES or too_long:
                    raise failure from error
            log.info("model_asked_again", model=self._config.model, tries=tries, wait_s=wait, reason=failure.message)
            await asyncio.sleep(wait)
        raise AssertionError("unreachable: the last try returns or raises")

    async def _client(self) -> "AsyncOpenAI":
        """The running loop's client: connections do not outlive their loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            if "openai" not in sys.modules:
                await asyncio.to_thread(importlib.import_module, "openai")  # takes about a second
            for other in list(self._clients):
                if other.is_closed():
                    del self._clients[other]
            if loop not in self._clients:
                lifetime = self._lifetime()
                self._clients[loop] = lifetime, await anext(lifetime)
        return self._clients[loop][1]

    async def _lifetime(self) -> "AsyncGenerator[AsyncOpenAI, None]":
        # A generator, because asyncio.run closes those its loop leaves open: so nobody need call aclose.
        import openai  # noqa: PLC0415 - slow to import

        base_url = self._config.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        key = self._config.api_key or os.environ.get("OPENAI_API_KEY")
        if not key and base_url != OPENAI_URL:
            key = "none"  # the library insists on one, local servers do not
        async with openai.AsyncOpenAI(
            api_key=key or None,
            base_url=base_url,
            max_retries=0,
            timeout=openai.Timeout(SILENCE_S, connect=CONNECT_S),
        ) as client:
            yield client

    def _request(self, params: CompletionParams) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self._config.model,
            "messages": [_message(each) for each in params.messages],
            "temperature": params.temperature,
            "max_tokens": params.max_tokens,
        }
        if params.tools:
            request["tools"] = [_tool(each) for each in params.tools]
        if params.json_schema is not None:
            schema = {"name": "answer", "schema": params.json_schema}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return request

    def _failure(self, error: Exception) -> tuple[AgentFailed, bool]:
        """The typed error for whatever came out of the library, and whether another try may help.

        That is more than its own errors: it builds its objects unchecked, so that a server which answers
        something else shows as any kind of error where the answer is read.
        """
        import openai  # noqa: PLC0415 - slow to import

        server = f"the model's server at {self._host()}"
        match error:
            case openai.APIConnectionError():
                return AgentFailed(_silence(error, server)), True
            case openai.APIStatusError():
                return self._refusal(error, server)
            case openai.APIError():
                return AgentFailed(f"{server} failed{self._reason(error)}"), True
            case openai.OpenAIError():
                return AgentFailed("the model needs an API key: set OPENAI_API_KEY or AgentConfig(api_key=…)"), False
            case _ if type(error).__module__.partition(".")[0] in HTTP_LIBRARIES:
                return AgentFailed(_silence(error, server)), True
            case _:
                return AgentFailed(f"the answer of {server} could not be read ({type(error).__name__})"), False

    def _refusal(self, error: "APIStatusError", server: str) -> tuple[AgentFailed, bool]:
        status = error.status_code
        wait = retry_after_s(error.response.headers, time.time())
        facts = {} if wait is None else {"retry_after_s": wait}
        if status in REFUSES_ACCESS:  # its message may repeat a part of the key
            return AgentFailed(f"{server} refuses access ({status}): check the API key"), False
        if status in TRY_AGAIN:
            return AgentFailed(f"{server} is too busy ({status}){self._reason(error)}", **facts), True
        if status >= SERVER_ERROR:
            return AgentFailed(f"{server} failed ({status}){self._reason(error)}", **facts), True
        return AgentFailed(f"{server} refused the request ({status}){self._reason(error)}"), False

    def _reason(self, error: "APIError") -> str:
        """Return the server's own message, without secrets; empty where it is a page of HTML."""
        text = error.body.get("message") if isinstance(error.body, dict) else None
        if not isinstance(text, str) or not text.strip():
            return ""
        text = redact(text_of(text[: 4 * MAX_REASON_CHARS]), [self._config.api_key or ""])
        return ": " + " ".join(text.split())[:MAX_REASON_CHARS]

    def _host(self) -> str:
        url = self._config.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        return urlsplit(url).netloc.rpartition("@")[2]


def backoff_s(tries: int, jitter: float) -> float:
    """Return how long to wait after so many failed tries: 1 s doubled each time, by `jitter` in [0, 1) ± 25 %."""
    return BACKOFF_S * 2.0 ** (tries - 1) * (0.75 + jitter / 2)


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Return how many seconds a server asks to wait, by `retry-after-ms` or `Retry-After` (seconds or a date).

    Args:
        headers: Looked up in lower case. A date counts from the server's own `Date`.
        now: Seconds since the epoch, for an answer without a `Date`.
    """
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit_s
        except ValueError:
            continue
        if isfinite(seconds) and seconds >= 0:
            return seconds
    until = _date(headers.get("retry-after", ""))
    if until is None:
        return None
    sent = _date(headers.get("date", ""))
    return max(0.0, until - (now if sent is None else sent))


def _date(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None


def _silence(error: Exception, server: str) -> str:
    """How the connection to `server` was lost, or not made."""
    kinds = {type(each).__name__ for each in (error, error.__cause__)}
    if "ConnectTimeout" in kinds:
        return f"{server} could not be reached within {CONNECT_S:g} s"
    if kinds & {"APITimeoutError", "ReadTimeout"}:
        return f"{server} said nothing for {SILENCE_S:g} s"
    return f"the connection to {server} failed"


def _deadline(params: CompletionParams) -> Deadline:
    return Deadline(LIMIT_S if params.timeout_s is None else params.timeout_s)


def _message(message: Message) -> dict[str, Any]:
    shape: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        shape["content"] = message.content or None
        shape["tool_calls"] = [
            {"id": each.id, "type": "function", "function": {"name": each.name, "arguments": each.arguments}}
            for each in message.tool_calls
        ]
    if message.role == "tool":
        shape["tool_call_id"] = message.tool_call_id
    return shape


def _tool(definition: ToolDefinition) -> dict[str, Any]:
    parameters = definition.parameters or {"type": "object", "properties": {}}
    function = {"name": definition.name, "description": definition.description, "parameters": parameters}
    return {"type": "function", "function": function}


class _Calls:
    """Tool calls, put together from fragments: id and name come first, arguments in any number of pieces."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Any]] = []
        self._open: dict[int | None, dict[str, Any]] = {}

    def add(self, fragments: Iterable[Any]) -> None:
        for fragment in fragments:
            index = getattr(fragment, "index", None)
            part = self._open.get(index)
            # Some servers give every call index 0, or none: a new id is a new call all the same.
            if part is None or (fragment.id and fragment.id != part["id"]):
                part = {"id": fragment.id or f"call_{len(self._parts)}", "name": "", "arguments": ""}
                self._open[index] = part
                self._parts.append(part)
            part["name"] = part["name"] or fragment.function.name or ""
            part["arguments"] += fragment.function.arguments or ""

    def whole(self) -> tuple[ToolCall, ...]:
        return tuple(ToolCall(**part) for part in self._parts)
