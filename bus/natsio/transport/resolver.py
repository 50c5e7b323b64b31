"""Resolves host names in daemon threads.

The event loops use threads that are joined when a program ends: up to 40 s later where no name server answers.
"""

import asyncio
import ipaddress
import socket
import threading
from contextlib import suppress
from functools import partial


class Resolver:
    """Resolves host names; concurrent requests for one name share a look-up."""

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Future[list[str]]] = {}

    async def addresses(self, host: str) -> list[str]:
        """Return the IP addresses of a host, in the order to try them.

        Raises:
            OSError: The name is not known (socket.gaierror), or cannot be looked up.
        """
        with suppress(ValueError):
            return [str(ipaddress.ip_address(host))]
        if host not in self._running:
            self._running[host] = self._look_up(host)
        return await asyncio.shield(self._running[host])

    def _look_up(self, host: str) -> asyncio.Future[list[str]]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[str]] = loop.create_future()

        def settle(found: list[str] | OSError) -> None:
            self._running.pop(host, None)
            if isinstance(found, OSError):
                future.set_exception(found)
                future.exception()  # marks it as retrieved: all waiters may have given up
            else:
                future.set_result(found)

        def work() -> None:
            found: list[str] | OSError
            try:
                found = list(dict.fromkeys(_address(entry) for entry in _entries(host)))
            except OSError as error:
                found = error
            except UnicodeError:  # a label of over 63 characters, or an empty one
                found = socket.gaierror(socket.EAI_NONAME, "not a host name")
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(partial(settle, found))

        threading.Thread(target=work, name="resolve a host name", daemon=True).start()
        return future


def _entries(host: str) -> list[tuple[object, ...]]:
    return list(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))


def _address(entry: tuple[object, ...]) -> str:
    return str(entry[4][0])  # type: ignore[index]  # (family, type, protocol, name, (address, port, …))
