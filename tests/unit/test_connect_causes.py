"""Each cause of a failed connection: one sentence, advice, and whether waiting helps."""

import socket
import ssl

import nats.errors
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.bus.natsio.transport.connect_causes import ConnectionClosedEarly, NoDataReceived, NotNats, cause_of


def certificate_error(code: int, message: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, message
    return error


@pytest.mark.parametrize(
    ("error", "what", "todo", "final"),
    [
        (ConnectionRefusedError(111, "Connect call failed"), "refused", "loom up", False),
        (OSError("Multiple exceptions: [Errno 111] Connect call failed, [Errno 111] x"), "refused", "loom up", False),
        (OSError(113, "No route to host"), "cannot be reached (EHOSTUNREACH)", "check host and port", False),
        (OSError("?"), "cannot be reached (OSError)", "check host and port", False),
        (ConnectionResetError(104, "reset"), "closes the connection", "log", False),
        (ConnectionClosedEarly(), "closes the connection", "log", False),
        (TimeoutError(), "no answer", "firewall", False),
        (NoDataReceived(), "no data arrives", "host and port", False),
        (NotNats(), "does not come from a nats-server", "host and port", False),
        (socket.gaierror(socket.EAI_NONAME, "x"), "host name is unknown", "check the name", False),
        (socket.gaierror(socket.EAI_AGAIN, "x"), "cannot be resolved at the moment", "name server", False),
        (certificate_error(10, "certificate has expired"), "has expired", "renew", True),
        (certificate_error(18, "self-signed certificate"), "not trusted (self-signed", "SSL_CERT_FILE", True),
        (certificate_error(20, "unable to get local issuer"), "not trusted", "SSL_CERT_FILE", True),
        (certificate_error(62, "Hostname mismatch."), "another host name", "name of the certificate", True),
        (certificate_error(64, "IP address mismatch."), "another host name", "name of the certificate", True),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"), "TLS fails", "log", True),
        (nats.errors.SecureConnWantedError(), "offers no TLS", "certificate", True),
        (nats.errors.Error("nats: 'Authorization Violation'"), "Authorization Violation", "password", True),
        (nats.errors.Error("nats: 'User Authentication Expired'"), "credentials", "password", True),
        (nats.errors.Error("nats: 'Secure Connection - TLS Required'"), "TLS Required", "tls://", True),
        (nats.errors.Error("nats: 'maximum connections exceeded'"), "maximum connections", "log", False),
        (nats.errors.Error("nats: odd"), "odd", "log", False),
        (RuntimeError("a secret"), "RuntimeError", "host and port", False),
    ],
)
def test_each_cause_is_named(error: Exception, what: str, todo: str, final: bool) -> None:
    cause = cause_of(error)

    assert what in cause.what
    assert todo in cause.todo
    assert cause.final is final
    assert "a secret" not in str(cause)


@given(st.text(max_size=5000))
def test_an_error_text_of_a_server_is_repeated_in_part_only(text: str) -> None:
    quoted = text.replace("'", "")
    assert len(str(cause_of(nats.errors.Error(f"nats: '{quoted} '")))) < 400
