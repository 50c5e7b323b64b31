"""Converts exceptions to fields of a log event: type, message and place, without values of variables."""

from loom.bus.logs.redaction import redact

MAX_MESSAGE_CHARS = 500
READ_CHARS = 8 * MAX_MESSAGE_CHARS
"""Most characters of a message that are searched for secrets, as messages may be of any length."""
MAX_NAME_CHARS = 100


def error_fields(error: BaseException | None) -> dict[str, str]:
    """Return the fields `error` (type, and message without secrets) and `at` (innermost place) of an exception."""
    if error is None:
        return {"error": "none"}
    return {"error": summary(error), "at": place_of(error)}


def summary(error: BaseException) -> str:
    """Return `TypeName: message` as one line of at most 500 characters, without secrets."""
    name, message = type_name(error), message_of(error)
    return (f"{name}: {message}" if message else name)[:MAX_MESSAGE_CHARS]


def type_name(error: BaseException) -> str:
    """Return the name of an exception's class, printable and bounded, also if the class overrides it."""
    name = type.__dict__["__name__"].__get__(type(error))  # bypasses a metaclass, which may be user code
    return "".join(char for char in name if char.isprintable())[:MAX_NAME_CHARS] or "an unnamed exception"


def message_of(error: BaseException) -> str:
    """Return an exception's message as one line without secrets; a note in parentheses if its `__str__` raises."""
    try:
        text = str(error)[:READ_CHARS].encode(errors="replace").decode()
    except BaseException as fault:  # noqa: BLE001 - `__str__` may be user code, and raise anything
        return f"(its __str__ raised {type_name(fault)})"
    return " ".join(redact(text).split())


def place_of(error: BaseException) -> str:
    """Return `file.py:line` of the innermost frame of `error`; empty if it was not raised."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}"
