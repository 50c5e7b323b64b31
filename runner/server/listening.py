"""Addresses of this machine that a server listens on."""

import errno
import ipaddress
import socket
from typing import Final

from loom.schemas.errors import BusUnavailable

LOOPBACK: Final = "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on can be reached from this machine alone; a name but localhost cannot."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def reachable(host: str) -> str:
    """Return the address by which clients of this machine reach a server that listens on `host`, as part of a URL."""
    local = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)  # noqa: S104 - an address to compare with
    return f"[{local}]" if ":" in local else local


def check_free(host: str, port: int) -> None:
    """Return if `port` of an address of this machine can be listened on; 0 always can.

    Raises:
        BusUnavailable: The port is taken, or not ours to take, or the address is not one of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a closed one is free
            probe.bind(address)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise BusUnavailable(f"{host} is not an address of this machine; choose another with --host") from error
        why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise BusUnavailable(f"port {port} {why}; choose another with --port, or set NATS_URL") from error
