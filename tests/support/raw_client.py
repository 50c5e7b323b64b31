"""A client that minds no rule of ours: its bytes go to the server as they are."""

import socket
from urllib.parse import urlparse


def publish_raw(url: str, *commands: bytes) -> None:
    """Send protocol lines, and return once the server has processed them."""
    where = urlparse(url)
    assert where.hostname
    assert where.port
    with socket.create_connection((where.hostname, where.port), timeout=20) as server, server.makefile("rb") as said:
        assert said.readline().startswith(b"INFO ")
        server.sendall(b'CONNECT {"verbose":false,"headers":true}\r\n' + b"".join(commands) + b"PING\r\n")
        assert said.readline() == b"PONG\r\n"


def with_headers(subject: bytes, headers: bytes, body: bytes) -> bytes:
    """Return the line that publishes `body` under a header block as it is."""
    return b"HPUB %s %d %d\r\n%s%s\r\n" % (subject, len(headers), len(headers) + len(body), headers, body)
