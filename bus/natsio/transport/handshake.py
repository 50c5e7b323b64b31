"""The handshake of a connection, up to CONNECT: addresses, TLS and credentials.

nats-py uses TLS only if the server requires it, whatever the address requires. It sends no credentials to servers that
it discovers from another server.
"""

import asyncio
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Any, NoReturn
from urllib.parse import ParseResult

import nats.errors
from nats.aio.client import DEFAULT_BUFFER_SIZE, Client, Srv
from nats.aio.transport import TcpTransport

from loom.bus.natsio.transport.addresses import Address, Login, logins, tls_required
from loom.bus.natsio.transport.connect_causes import ConnectionClosedEarly, NoDataReceived, NotNats
from loom.bus.natsio.transport.resolver import Resolver


class Transport(TcpTransport):
    """A TCP connection to the first address of a host that accepts it; keeps the first line that is read."""

    def __init__(self, resolver: Resolver) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nats-py's
        self._resolver = resolver
        self.first_line: bytes | None = None
        self._handshake_failed = False

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: float) -> None:
        """Resolve the host name, then connect.

        Args:
            connect_timeout: Seconds for each of the two steps.

        Raises:
            OSError: The name is unknown, or none of its addresses accepts a connection.
        """
        if self._bare_io_writer is not None:  # of the previous connection, which nats-py leaves open below TLS
            self._bare_io_writer.transport.abort()
        self.first_line, self._handshake_failed = None, False
        try:
            async with asyncio.timeout(connect_timeout):
                addresses = await self._resolver.addresses(uri.hostname or "")
        except TimeoutError:
            raise socket.gaierror(socket.EAI_AGAIN, "the name server does not answer") from None
        failure: OSError = socket.gaierror(socket.EAI_NONAME, "a host without an address")
        for address in addresses:
            try:
                async with asyncio.timeout(connect_timeout / len(addresses)):
                    reader, writer = await asyncio.open_connection(address, uri.port, limit=buffer_size)
            except OSError as error:  # TimeoutError too
                failure = error
            else:
                self._bare_io_reader = self._io_reader = reader
                self._bare_io_writer = self._io_writer = writer
                return
        raise failure

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        """Upgrade the connection to TLS.

        Raises:
            OSError: The handshake failed; an ssl.SSLError contains the cause.
        """
        assert self._io_writer is not None  # noqa: S101 - `connect` comes first
        reader = asyncio.StreamReader(limit=buffer_size)
        protocol = asyncio.StreamReaderProtocol(reader)
        protocol._over_ssl = True  # type: ignore[attr-defined]  # as asyncio itself does; else it warns at the end
        loop = asyncio.get_running_loop()
        host = uri if isinstance(uri, str) else uri.hostname
        try:
            async with asyncio.timeout(connect_timeout):
                below = self._io_writer.transport
                transport = await loop.start_tls(below, protocol, ssl_context, server_hostname=host)
        except BaseException:
            self._handshake_failed = True
            raise
        assert transport is not None  # noqa: S101 - only for a transport without TLS support
        self._io_reader, self._io_writer = reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def wait_closed(self) -> None:
        """Wait until the connection is closed."""
        if not self._handshake_failed:  # it would never return, because the failed upgrade has detached the stream
            await super().wait_closed()  # type: ignore[no-untyped-call]  # nats-py's

    async def readline(self) -> bytes:
        """Return a line; empty at the end of the connection."""
        line: bytes = await super().readline()  # type: ignore[no-untyped-call]  # nats-py's
        if self.first_line is None:
            self.first_line = line
        return line


class HandshakeClient(Client):
    """A client that follows the scheme and the credentials of its addresses.

    Args:
        addresses: The servers. If one of them requires TLS, nothing is sent to any server without TLS.
        resolver: Resolves host names.
        failures: Receives the last error of each server: host and port -> error.
    """

    def __init__(
        self,
        addresses: Sequence[Address] = (),
        resolver: Resolver | None = None,
        failures: dict[str, Exception] | None = None,
    ) -> None:
        super().__init__()
        self._tls_required = tls_required(addresses)
        self._known = {address.netloc for address in addresses}
        self._logins = logins(addresses)
        self._resolver = resolver or Resolver()
        self._failures = {} if failures is None else failures

    async def _connect_to_server(self, s: Srv) -> None:
        s.last_attempt = time.monotonic()
        if not isinstance(self._transport, Transport):
            self._transport = Transport(self._resolver)
        try:
            await self._transport.connect(s.uri, DEFAULT_BUFFER_SIZE, self.options["connect_timeout"])
        except OSError as error:
            self._failures[s.uri.netloc] = error
            raise

    async def _process_connect_init(self) -> None:
        server = self._current_server.uri.netloc if self._current_server is not None else ""
        try:
            await super()._process_connect_init()
        except Exception as error:  # noqa: BLE001 - nats-py fails in many ways at another protocol
            failure = self._explained(error)
            self._failures[server] = failure
            _raise(failure, error)
        self._failures.pop(server, None)

    def _explained(self, error: Exception) -> Exception:
        """Return a more specific error, of a type that nats-py handles."""
        first_line = self._transport.first_line if isinstance(self._transport, Transport) else None
        if isinstance(error, TimeoutError) and first_line is None:
            return NoDataReceived()
        if isinstance(error, nats.errors.Error | OSError) and (first_line or b"").startswith(b"INFO "):
            return error
        if isinstance(error, OSError):
            return error
        return NotNats() if first_line else ConnectionClosedEarly()

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Process the INFO of a server, to which nothing has been sent yet.

        Raises:
            SecureConnWantedError: TLS is required, and the server does not offer it.
        """
        if initial_connection and self._tls_required:
            if not (info.get("tls_required") or info.get("tls_available")):
                raise nats.errors.SecureConnWantedError
            info["tls_required"] = True  # the only field that nats-py checks
        await super()._process_info(info, initial_connection)

    def _connect_command(self) -> bytes:
        login = self._login()
        self._auth_configured = login is not None
        if login is not None:
            self.options.update(user=login.user, password=login.password, token=login.token)
        return super()._connect_command()

    def _login(self) -> Login | None:
        """Return the credentials for the current server; a discovered server gets those of the first address."""
        server = self._current_server.uri.netloc if self._current_server is not None else ""
        if server in self._known:
            return self._logins.get(server)
        return next(iter(self._logins.values()), None)


def _raise(failure: Exception, error: Exception) -> NoReturn:
    if failure is error:
        raise failure
    raise failure from error
