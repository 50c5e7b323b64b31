"""Unexpected exceptions as facts for a log line: what and where, never the values that were around."""

from loom.bus.logs.redaction import redact

MAX_MESSAGE_CHARS = 500
READ_CHARS = 8 * MAX_MESSAGE_CHARS
"""As much of a message is looked at: it may be of any length, and looking for secrets takes time."""
MAX_NAME_CHARS = 100


def error_fields(error: BaseException | None) -> dict[str, str]:
    """Return type, message without secrets, and innermost place of `error`."""
    if error is None:
        return {"error": "none"}
    return {"error": summary(error), "at": place_of(error)}


def summary(error: BaseException) -> str:
    """Return `TypeName: message` on one line without secrets, at most 500 characters: no repr, no traceback."""
    name, message = type_name(error), message_of(error)
    return (f"{name}: {message}" if message else name)[:MAX_MESSAGE_CHARS]


def type_name(error: BaseException) -> str:
    """Return the name of an exception's class, printable and bounded whatever the class makes of it."""
    name = type.__dict__["__name__"].__get__(type(error))  # past a metaclass, which may be a user's
    return "".join(char for char in name if char.isprintable())[:MAX_NAME_CHARS] or "an unnamed exception"


def message_of(error: BaseException) -> str:
    """Return an exception's message on one line and without secrets; empty when its `__str__` raises."""
    try:
        text = str(error)[:READ_CHARS].encode(errors="replace").decode()
    except BaseException as fault:  # noqa: BLE001 - `__str__` may be a user's, and may raise anything
        return f"(its __str__ raised {type_name(fault)})"
    return " ".join(redact(text).split())


def place_of(error: BaseException) -> str:
    """Return `file.py:line` of the innermost frame of `error`; empty if it was never raised."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}"
