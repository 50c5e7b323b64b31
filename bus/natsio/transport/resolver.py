"""Resolves host names in daemon threads.

The threads of event loops are joined when a program ends, which takes up to 40 s if no name server answers.
"""

import asyncio
import ipaddress
import socket
import threading
from contextlib import suppress
from functools import partial


class Resolver:
    """Resolves host names; concurrent requests for one name share a thread."""

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Future[list[str]]] = {}

    async def addresses(self, host: str) -> list[str]:
        """Return the IP addresses of a host, in the order in which to try them.

        Raises:
            OSError: The name is unknown (socket.gaierror), or cannot be resolved.
        """
        with suppress(ValueError):
            return [str(ipaddress.ip_address(host))]
        if host not in self._running:
            self._running[host] = self._resolve(host)
        return await asyncio.shield(self._running[host])

    def _resolve(self, host: str) -> asyncio.Future[list[str]]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[str]] = loop.create_future()

        def finish(result: list[str] | OSError) -> None:
            self._running.pop(host, None)
            if isinstance(result, OSError):
                future.set_exception(result)
                future.exception()  # marks it as retrieved: all waiting tasks may have been cancelled
            else:
                future.set_result(result)

        def work() -> None:
            result: list[str] | OSError
            try:
                result = list(dict.fromkeys(_address(entry) for entry in _entries(host)))
            except OSError as error:
                result = error
            except UnicodeError:  # a label is empty or has over 63 characters
                result = socket.gaierror(socket.EAI_NONAME, "not a host name")
            with suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(partial(finish, result))

        threading.Thread(target=work, name="resolve a host name", daemon=True).start()
        return future


def _entries(host: str) -> list[tuple[object, ...]]:
    return list(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))


def _address(entry: tuple[object, ...]) -> str:
    return str(entry[4][0])  # type: ignore[index]  # (family, type, protocol, name, (address, port, …))
