"""Replies to clients: the one answer of a task, and errors, the same in every language."""

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
"""Longest reply subject a record keeps."""
_CHARACTER = r"(?![.*>])[!-~]"
"""Of a token: printable ASCII, no wildcard."""
_REST = rf"(\.({_CHARACTER})+)+"
"""The tokens after the first one."""
_of_client = re.compile(rf"(_R_|_INBOX({_CHARACTER})*){_REST}").fullmatch
"""Inboxes of clients, with a prefix of their own or not, and what the server makes of them between accounts."""
_of_cluster = re.compile(rf"_LOOM{_REST}").fullmatch
"""Inboxes of phases, hosts and operators."""


def may_answer(reply: str, *, plain: bool = False) -> bool:
    """Return whether an answer may go to `reply`; any other subject could be a command.

    Args:
        plain: Whether the request came by a plain subject, which phases and operators use as well.
    """
    return len(reply) <= MAX_REPLY and bool(_of_client(reply) or (plain and _of_cluster(reply)))


def allowed_reply(bus: Bus, reply: str, *, plain: bool, subject: str) -> str:
    """Return `reply` where an answer may go to it; else count and log it, and return an empty subject.

    Args:
        plain: As for `may_answer`.
        subject: Of the request, for the log.
    """
    if not reply or may_answer(reply, plain=plain):
        return reply
    bus.discards.add("reply_refused", reason=f"no answers go to {reply[:MAX_REPLY]!r}", subject=subject)
    return ""


async def answer(bus: Bus, reply: str, message: Any) -> None:
    """Publish `message` to `reply`, at most once; an empty subject gets no answer.

    Args:
        reply: As `allowed_reply` has returned it.
    """
    if reply:
        await bus.connection.publish(reply, message)


async def answer_error(bus: Bus, reply: str, error: LoomError) -> None:
    """Refuse a request: code and sentence are in the headers and in the body; `reply` is as for `answer`."""
    if not reply:
        return
    body = ErrorReply(
        code=cut_name(error.code),
        message=cut_note(error.message),
        field=None if error.field is None else cut_name(error.field),
    )
    await bus.connection.publish(reply, body, headers=error_headers(error.code, error.message))


def error_headers(code: str, message: str) -> dict[str, str]:
    """Return the headers by which NATS service clients recognise an error."""
    sentence = " ".join(message.encode("ascii", "replace").decode().split())[:300]
    return {"Nats-Service-Error": sentence, "Nats-Service-Error-Code": code}


async def answer_task(bus: Bus, reply: str, record: TaskRecord) -> None:
    """Answer a submit with the result of its task, which has ended; one with an error has it in the headers, too.

    Args:
        reply: Where the result is wanted, as a submission or a record has it.
    """
    subject = bus.subjects.of("result", record.envelope.submitter, record.task_id)
    reply = allowed_reply(bus, reply, plain=record.envelope.submitter == PUBLIC, subject=subject)
    if reply:
        result = record.to_result()
        headers = error_headers(result.error.code, result.error.message) if result.error else None
        await bus.connection.publish(reply, result, headers=headers)
