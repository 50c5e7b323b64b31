"""Clients of the openai library, one per event loop, because connections belong to an event loop."""

import asyncio
import importlib
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from loom.agents.llm.openai.endpoints import Endpoint
from loom.agents.llm.openai.refusals import ErrorReply, body_of
from loom.agents.user_code import type_name
from loom.bus.logs.redaction import redact
from loom.schemas.errors import AgentFailed

if TYPE_CHECKING:
    from openai import AsyncOpenAI


FIRST_ERROR = 400
"""The lowest HTTP status of an error."""
MAX_ERROR_BYTES = 64 * 1024
"""Bytes that are read of the body of an error."""


class Clients:
    """Creates a client on first use in an event loop, and keeps it until the loop is closed.

    Args:
        timeout_s: Seconds that a server may send no data.
        connect_timeout_s: Seconds that a connection may take.
    """

    def __init__(self, timeout_s: float, connect_timeout_s: float) -> None:
        self._timeout_s, self._connect_timeout_s = timeout_s, connect_timeout_s
        self._clients: dict[asyncio.AbstractEventLoop, tuple[AsyncGenerator[AsyncOpenAI, None], AsyncOpenAI]] = {}

    async def get(self, endpoint: Endpoint) -> "AsyncOpenAI":
        """Return the client of the running event loop.

        Raises:
            AgentFailed: The proxy or the certificates of the environment cannot be used.
        """
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            if "openai" not in sys.modules:
                await asyncio.to_thread(importlib.import_module, "openai")  # takes about a second
            for other in list(self._clients):
                if other.is_closed():
                    del self._clients[other]
            if loop not in self._clients:
                lifetime = self._lifetime(endpoint)
                self._clients[loop] = lifetime, await anext(lifetime)
        return self._clients[loop][1]

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        lifetime, _ = self._clients.pop(asyncio.get_running_loop(), (None, None))
        if lifetime is not None:
            await lifetime.aclose()

    async def _lifetime(self, endpoint: Endpoint) -> "AsyncGenerator[AsyncOpenAI, None]":
        # asyncio.run closes open async generators of its loop, so that aclose is optional.
        async with self._client(endpoint) as client:
            yield client

    def _client(self, endpoint: Endpoint) -> "AsyncOpenAI":
        import openai  # noqa: PLC0415 - slow to import

        timeout = openai.Timeout(self._timeout_s, connect=self._connect_timeout_s)
        options: dict[str, Any] = {
            "api_key": endpoint.key,
            "default_headers": endpoint.headers,
            "default_query": endpoint.query,
            "max_retries": 0,
            "timeout": timeout,
        }
        try:
            options["http_client"] = openai.DefaultAsyncHttpxClient(
                timeout=timeout, event_hooks={"response": [_raise_error]}
            )
        except (ImportError, OSError, ValueError) as error:
            raise AgentFailed(_unusable(error), field="environment") from error
        if not endpoint.azure:
            return openai.AsyncOpenAI(base_url=endpoint.url, **options)
        version = endpoint.query["api-version"]
        if endpoint.url.count("/") == len("//"):  # a URL without a path is the address of the resource
            return openai.AsyncAzureOpenAI(azure_endpoint=endpoint.url, api_version=version, **options)
        return openai.AsyncAzureOpenAI(base_url=endpoint.url, api_version=version, **options)


async def _raise_error(response: Any) -> None:
    """Check the status of a response; at most MAX_ERROR_BYTES of the body of an error are read.

    Raises:
        ErrorReply: The status is 400 or above.
    """
    if response.status_code < FIRST_ERROR:
        return
    body = bytearray()
    with suppress(Exception):  # an error without a readable body is raised as well
        async with aclosing(response.aiter_bytes()) as pieces:
            async for piece in pieces:
                body += piece[: MAX_ERROR_BYTES - len(body)]
                if len(body) == MAX_ERROR_BYTES:
                    break
    raise ErrorReply(body_of(body.decode(errors="replace")), response.status_code, response.headers)


def _unusable(error: Exception) -> str:
    """Return why the environment does not permit any connection."""
    match error:
        case ImportError():
            return (
                "the proxy in HTTPS_PROXY, HTTP_PROXY or ALL_PROXY is a SOCKS proxy, which needs the package socksio: "
                "install it, unset the variable, or set NO_PROXY"
            )
        case OSError():
            return "SSL_CERT_FILE or SSL_CERT_DIR does not name certificates that can be read"
        case _ if "proxy" in str(error).lower():
            return f"a proxy in HTTPS_PROXY, HTTP_PROXY or ALL_PROXY cannot be used: {redact(str(error))[:200]}"
        case _:
            return f"the proxies and certificates of the environment cannot be used ({type_name(error)})"
