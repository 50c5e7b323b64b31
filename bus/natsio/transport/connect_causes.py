"""Converts the errors of connection attempts into causes: one sentence each, with the remedy."""

import errno
import re
import socket
import ssl
from typing import NamedTuple

import nats.errors

START_ONE = "start one there, or run `loom up` without NATS_URL"
CHECK_ADDRESS = "check host and port in NATS_URL"
CHECK_LOGIN = "check the user and password, or the token, in NATS_URL"

LONGEST = 200
"""Most characters of the server's error text in a cause."""

_EXPIRED, _HOSTNAME, _IP = 10, 62, 64  # X509_V_ERR_…


class NotNats(nats.errors.Error):
    """The first line of the peer does not belong to the NATS protocol."""


class NoDataReceived(nats.errors.Error):
    """The peer accepted the connection and sent nothing."""


class ConnectionClosedEarly(nats.errors.Error):
    """The peer closed the connection before it had sent anything."""


class Cause(NamedTuple):
    """Why a connection failed."""

    what: str
    todo: str
    final: bool = False
    """Whether later attempts would fail, too."""

    def __str__(self) -> str:
        return f"{self.what}; {self.todo}"


_PLAIN: dict[type[BaseException], Cause] = {
    nats.errors.SecureConnWantedError: Cause(
        "the server offers no TLS", "give it a certificate, or write nats:// in NATS_URL", final=True
    ),
    ConnectionClosedEarly: Cause("the server closes the connection", "it may be starting or stopping: see its log"),
    NoDataReceived: Cause(
        "the connection is accepted, but no data arrives", f"{CHECK_ADDRESS}: no nats-server is there"
    ),
    NotNats: Cause("the answer does not come from a nats-server", CHECK_ADDRESS),
    TimeoutError: Cause("no answer", f"{CHECK_ADDRESS}; a firewall may drop the packets"),
}


def cause_of(error: BaseException, *, tls: bool = False) -> Cause:
    """Return the cause of a failed attempt to connect.

    Args:
        error: The exception of the attempt.
        tls: Whether the addresses require TLS.
    """
    for kind, cause in _PLAIN.items():
        if isinstance(error, kind):
            return cause
    match error:
        case ssl.SSLError():
            return _tls(error)
        case nats.errors.Error():
            return _refusal(str(error), tls=tls)
        case socket.gaierror():
            return _unresolved(error)
        case OSError():
            return _os_error(error)
        case _:
            return Cause(f"the answer cannot be read ({type(error).__name__})", CHECK_ADDRESS)


def _tls(error: ssl.SSLError) -> Cause:
    if not isinstance(error, ssl.SSLCertVerificationError):
        reason = getattr(error, "reason", None) or "no reason given"  # absent if Python itself raised the error
        return Cause(f"TLS fails ({reason})", "see the server's log", final=True)
    reason = error.verify_message.rstrip(".") or "no reason given"
    if error.verify_code == _EXPIRED:
        return Cause("the server's certificate has expired", "renew it on the server", final=True)
    if error.verify_code in {_HOSTNAME, _IP}:
        todo = "write the name of the certificate in NATS_URL"
        return Cause("the server's certificate is for another host name", todo, final=True)
    todo = "set SSL_CERT_FILE to the file of the authority that signed it"
    return Cause(f"the server's certificate is not trusted ({reason})", todo, final=True)


def _refusal(text: str, *, tls: bool) -> Cause:
    """Return the cause of an error text of the server, which nats-py puts in quotes."""
    quoted = re.search(r"'([^']+)'", text)
    if quoted is None:
        return Cause(text.removeprefix("nats: "), "see the server's log")
    words = quoted[1][:LONGEST]
    lower = words.lower()
    if "authorization" in lower or "authentication" in lower:
        return Cause(f"the server refuses the credentials ({words})", CHECK_LOGIN, final=True)
    if "tls" in lower or "secure connection" in lower:
        todo = "see the server's log" if tls else "write tls:// in NATS_URL"
        return Cause(f"the server refuses the connection ({words})", todo, final=True)
    return Cause(f"the server refuses the connection ({words})", "see the server's log")


def _unresolved(error: socket.gaierror) -> Cause:
    if error.errno == socket.EAI_AGAIN:
        return Cause("the host name cannot be resolved at the moment", "check the name, and this machine's name server")
    return Cause("the host name is unknown", "check the name in NATS_URL")


def _os_error(error: OSError) -> Cause:
    numbers = {error.errno, *(int(number) for number in re.findall(r"\[Errno (\d+)\]", str(error)))}
    if errno.ECONNREFUSED in numbers:
        return Cause("the connection is refused", START_ONE)
    if numbers & {errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED}:
        return _PLAIN[ConnectionClosedEarly]
    known = next((number for number in numbers if number), None)
    return Cause(f"the host cannot be reached ({errno.errorcode.get(known or 0, type(error).__name__)})", CHECK_ADDRESS)
