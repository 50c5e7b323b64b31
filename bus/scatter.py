"""Ask everybody at once and stop listening early: request-many."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import structlog

from loom.bus.client import Bus, Msg
from loom.schemas.wire import Undecodable, decode

log = structlog.get_logger()
T = TypeVar("T")


async def scatter(
    bus: Bus, subject: str, question: Any, shape: type[T], *, window_s: float, enough: Callable[[list[T]], bool]
) -> list[T]:
    """Publish `question` and return the answers, in order of arrival.

    Args:
        window_s: Longest wait.
        enough: Whether to stop waiting; asked after every answer.

    Returns:
        What came in time; answers that are not a `shape` are logged and left out.
    """
    answers: list[T] = []
    over = asyncio.Event()

    def take(msg: Msg) -> None:
        if msg.status == "503":
            over.set()
            return
        try:
            answers.append(decode(msg.data, shape))
        except Undecodable as error:
            log.warning("answer_undecodable", subject=subject, reason=error.message)
            return
        if enough(answers):
            over.set()

    reply = bus.open_inbox(take)
    try:
        await bus.publish(subject, question, reply=reply)
        async with asyncio.timeout(window_s):
            await over.wait()
    except TimeoutError:
        pass  # the window is a normal end
    finally:
        bus.close_inbox(reply)
    return answers
