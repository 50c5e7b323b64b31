"""A NATS client that sends raw protocol lines."""

import socket
from urllib.parse import urlparse


def publish_raw(url: str, *commands: bytes) -> None:
    """Send protocol lines, and return once the server has processed them."""
    address = urlparse(url)
    assert address.hostname
    assert address.port
    with (
        socket.create_connection((address.hostname, address.port), timeout=20) as server,
        server.makefile("rb") as replies,
    ):
        assert replies.readline().startswith(b"INFO ")
        server.sendall(b'CONNECT {"verbose":false,"headers":true}\r\n' + b"".join(commands) + b"PING\r\n")
        assert replies.readline() == b"PONG\r\n"


def with_headers(subject: bytes, headers: bytes, body: bytes) -> bytes:
    """Return the HPUB command that publishes `body` with a raw header block."""
    return b"HPUB %s %d %d\r\n%s%s\r\n" % (subject, len(headers), len(headers) + len(body), headers, body)
