"""Ask everybody at once and stop listening early: request-many."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from loom.bus.logs.discards import Discards
from loom.bus.natsio.requests import Requests
from loom.bus.natsio.transport.message import Msg
from loom.schemas.base import Undecodable

T = TypeVar("T")


async def request_many(
    requests: Requests,
    subject: str,
    question: Any,
    read: Callable[[bytes], T | None],
    *,
    discards: Discards,
    window_s: float,
    enough: Callable[[list[T]], bool],
) -> list[T]:
    """Publish `question` and return the answers, in order of arrival.

    Args:
        read: Decodes an answer; raises Undecodable for one that is to be left out, or returns None when it has counted
            that itself.
        window_s: Longest wait.
        enough: Whether to stop waiting; asked once after every answer, which is the last of those it is given.

    Returns:
        What came in time; the other answers are counted and left out.
    """
    answers: list[T] = []
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        if not over.done():
            over.set_result(None)

    def take(msg: Msg) -> None:
        if msg.status == "503":
            end()
            return
        try:
            found = read(msg.data)
        except Undecodable as error:
            discards.add("answer_undecodable", reason=error.message, subject=subject)
            return
        if found is None:
            return
        answers.append(found)
        if enough(answers):
            end()

    reply = requests.open_inbox(take)
    try:
        await requests.connection.publish(subject, question, reply=reply)
        window = loop.call_later(window_s, end)
        try:
            await over
        finally:
            window.cancel()
    finally:
        requests.close_inbox(reply)
    return answers
