"""Program of a helper process: compiles and runs the patterns and JSON Schemas of submitters.

check_process.py starts it with a socket as standard input; it imports nothing of loom. Each message is 4 bytes of
length, then JSON. The kernel ends the process when a check exceeds its CPU time (SIGPROF) or its memory.
"""

import os
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final

import jsonschema_rs
import msgspec
import regex

MEMORY_BYTES: Final = 512 << 20
"""Limit of address space, in addition to that of the started process."""
RETIRE_KIB: Final = 128 << 10
"""Growth after which the process ends with its answer, so that the next check has all of the memory."""
ORPHAN_S: Final = 5.0
"""Seconds between checks of the parent, because a forked child of it may keep a copy of the socket open."""
KEPT: Final = 64
"""Limit of cached patterns, and of cached validators."""
SEARCH_SHARE: Final = 0.8
"""Share of the CPU time for the search of a pattern, which can stop by itself and keep the process alive."""
_SOCKET: Final = 0
_LENGTH = struct.Struct(">I")


class Request(msgspec.Struct, frozen=True):
    """A check.

    Args:
        cpu_s: CPU seconds.
        content: The result to check; None: pattern and schema are only compiled.
    """

    cpu_s: float
    pattern: str | None
    json_schema: msgspec.Raw
    content: str | None


class Reply(msgspec.Struct, frozen=True):
    """The outcome of a check.

    Args:
        kind: "unusable": does not compile; "unmet": the content does not match; "slow", "memory": a limit was reached.
        fault: One sentence; empty when kind is "met".
        last: Whether the process ends after this reply.
    """

    kind: str
    fault: str = ""
    last: bool = False


def check(request: Request) -> Reply:
    """Return the outcome of one check, within the memory of this process."""
    schema = bytes(request.json_schema)
    try:
        fault = _compile(request.pattern, schema)
        if fault is not None:
            return Reply("unusable", fault)
        if request.content is not None:
            fault = _unmet(request.pattern, schema, request.content, request.cpu_s)
    except MemoryError:
        _clear()
        return Reply("memory")
    except TimeoutError:
        return Reply("slow")
    return Reply("met") if fault is None else Reply("unmet", fault)


def _compile(pattern: str | None, schema: bytes) -> str | None:
    try:
        if pattern is not None:
            _pattern(pattern)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - odd patterns raise more than regex.error, such as RecursionError
        return f"accept.pattern is not a regular expression: {_first_line(error)}"
    try:
        if schema != b"null":
            _validator(schema)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the schema is unusable, whatever the library raises
        return f"accept.json_schema is not a JSON Schema: {_first_line(error)}"
    return None


def _unmet(pattern: str | None, schema: bytes, content: str, cpu_s: float) -> str | None:
    if pattern is not None and _pattern(pattern).search(content, timeout=cpu_s * SEARCH_SHARE) is None:
        return f"the result does not match the pattern {pattern!r}"
    if schema == b"null":
        return None
    try:
        value = msgspec.json.decode(content)
    except (ValueError, RecursionError):
        return "the result is not JSON"
    try:
        _validator(schema).validate(value)
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as error:
        return f"the result does not fit the JSON Schema: {_first_line(error)}"
    return None


@lru_cache(maxsize=KEPT)
def _pattern(pattern: str) -> "regex.Pattern[str]":
    return regex.compile(pattern, cache_pattern=False)


@lru_cache(maxsize=KEPT)
def _validator(schema: bytes) -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for(msgspec.json.decode(schema), retriever=_nothing)


def _nothing(uri: str) -> Any:
    """Refuse references out of the schema, so that submitters cannot make this process open an address."""
    raise ValueError(f"{uri} is outside of the schema")


def _clear() -> None:
    _pattern.cache_clear()
    _validator.cache_clear()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def main() -> None:
    """Answer checks until the parent closes its end or has ended."""
    parent = int(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent's thread may block SIGPROF
    check(Request(1.0, r"\{", msgspec.Raw(b"{}"), "{}"))  # allocations of the first use do not count for the limit
    _limit()
    grown = _peak_kib() + RETIRE_KIB
    _write(b"")
    while (raw := _read(lambda: os.getppid() != parent)) is not None:
        request = msgspec.json.decode(raw, type=Request)
        signal.setitimer(signal.ITIMER_PROF, request.cpu_s)
        reply = check(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        last = _peak_kib() > grown
        _write(msgspec.json.encode(msgspec.structs.replace(reply, last=last)))
        if last:
            return


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # not Linux, or a lower limit of the system, which stays
        with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123 - pathlib is not imported here
            pages = int(statm.read().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _peak_kib() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def _read(is_orphan: Callable[[], bool]) -> bytes | None:
    """Return the next message; None when the parent has ended."""
    while not select.select([_SOCKET], [], [], ORPHAN_S)[0]:
        if is_orphan():
            return None
    head = _read_exactly(_LENGTH.size)
    return None if head is None else _read_exactly(_LENGTH.unpack(head)[0])


def _read_exactly(size: int) -> bytes | None:
    parts: list[bytes] = []
    while size:
        part = os.read(_SOCKET, min(size, 1 << 16))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _write(message: bytes) -> None:
    message = _LENGTH.pack(len(message)) + message
    while message:
        message = message[os.write(_SOCKET, message) :]
