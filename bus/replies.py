"""Replies and error replies to the inboxes of clients."""

import re
from typing import Any

from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.schemas.base import cut_name, cut_note
from loom.schemas.errors import LoomError
from loom.schemas.identity import PUBLIC
from loom.schemas.record import TaskRecord
from loom.schemas.task import ErrorReply

log = get_logger()

MAX_REPLY = 256
"""Most characters of a reply subject."""
_CHARACTER = r"(?![.*>])[!-~]"
"""Pattern of one character of a token: printable ASCII, not a wildcard."""
_REST = rf"(\.({_CHARACTER})+)+"
"""Pattern of the tokens after the first one."""
_of_client = re.compile(rf"(_R_|_INBOX({_CHARACTER})*){_REST}").fullmatch
"""Matches inboxes of clients, also with a prefix of their own or as mapped by the server between accounts."""
_of_cluster = re.compile(rf"_LOOM{_REST}").fullmatch
"""Matches inboxes of phases, hosts and operators."""


def is_inbox(reply: str, *, plain: bool = False) -> bool:
    """Return whether `reply` is an inbox, and may get a reply; any other subject could be a command.

    Args:
        plain: Whether the request came by a plain subject, which phases and operators use, too.
    """
    return len(reply) <= MAX_REPLY and bool(_of_client(reply) or (plain and _of_cluster(reply)))


def allowed_reply(bus: Bus, reply: str, *, plain: bool, subject: str) -> str:
    """Return `reply` if it is an inbox; else count and log it, and return an empty subject.

    Args:
        plain: As for `is_inbox`.
        subject: Subject of the request, for the log.
    """
    if not reply or is_inbox(reply, plain=plain):
        return reply
    bus.discards.add("reply_refused", reason=f"{reply[:MAX_REPLY]!r} is not an inbox", subject=subject)
    return ""


async def send_reply(bus: Bus, reply: str, message: Any) -> None:
    """Publish `message` to `reply`, at most once.

    Args:
        reply: Result of `allowed_reply`; if it is empty, nothing is published.
    """
    if reply:
        await bus.connection.publish(reply, message)


async def send_error(bus: Bus, reply: str, error: LoomError) -> None:
    """Publish an error reply, with code and message in the headers and in the body.

    Args:
        reply: As for `send_reply`.
    """
    if not reply:
        return
    body = ErrorReply(
        code=cut_name(error.code),
        message=cut_note(error.message),
        field=None if error.field is None else cut_name(error.field),
    )
    await bus.connection.publish(reply, body, headers=error_headers(error.code, error.message))


def error_headers(code: str, message: str) -> dict[str, str]:
    """Return the headers by which clients of NATS services recognise an error."""
    sentence = " ".join(message.encode("ascii", "replace").decode().split())[:300]
    return {"Nats-Service-Error": sentence, "Nats-Service-Error-Code": code}


async def send_result(bus: Bus, reply: str, record: TaskRecord) -> None:
    """Reply to a submit request with the result of its task; the error of a failed task is in the headers, too.

    Args:
        reply: Reply subject in the submission or in the record; checked here.
        record: Record of a task that has ended.
    """
    subject = bus.subjects.of("result", record.envelope.submitter, record.task_id)
    reply = allowed_reply(bus, reply, plain=record.envelope.submitter == PUBLIC, subject=subject)
    if reply:
        result = record.to_result()
        headers = error_headers(result.error.code, result.error.message) if result.error else None
        await bus.connection.publish(reply, result, headers=headers)
