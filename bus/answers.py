"""Replies to clients: the one answer of a task, and errors, the same in every language."""

from typing import Any

from loom.bus.client import Bus
from loom.bus.log import get_logger
from loom.schemas.envelope import TaskRecord
from loom.schemas.errors import LoomError
from loom.schemas.task import ErrorReply
from loom.schemas.wire import cut_name, cut_note

log = get_logger()

REPLY_PREFIXES = ("_INBOX.", "_R_.")
"""Where answers may go: client inboxes, and what the server makes of them between accounts."""
MAX_REPLY = 256
"""Longest reply subject a record keeps."""


def may_answer(reply: str) -> bool:
    """Return whether `reply` is a client's inbox; any other subject could be somebody's command."""
    return reply.startswith(REPLY_PREFIXES) and len(reply) <= MAX_REPLY


async def answer(bus: Bus, reply: str, message: Any) -> None:
    """Publish `message` to a client's inbox, at most once."""
    if reply and may_answer(reply):
        await bus.publish(reply, message)


async def answer_error(bus: Bus, reply: str, error: LoomError) -> None:
    """Publish an error reply: code and sentence in the headers and in the body."""
    if not (reply and may_answer(reply)):
        return
    body = ErrorReply(
        code=cut_name(error.code),
        message=cut_note(error.message),
        field=None if error.field is None else cut_name(error.field),
        task_id=None if error.task_id is None else cut_name(error.task_id),
        best_rejected=error.best_rejected,
    )
    await bus.publish(reply, body, headers=error_headers(error.code, error.message))


def error_headers(code: str, message: str) -> dict[str, str]:
    """Return the headers by which NATS service clients recognise an error."""
    sentence = " ".join(message.encode("ascii", "replace").decode().split())[:300]
    return {"Nats-Service-Error": sentence, "Nats-Service-Error-Code": code}


async def answer_task(bus: Bus, reply: str, record: TaskRecord) -> None:
    """Answer with the result of an ended task; a failed one also says so as an error."""
    result = record.to_result()
    if result.error is None:
        await answer(bus, reply, result)
    else:
        await answer_error(bus, reply, result.error.to_exception(record.task_id))
