"""One request with many replies."""

from collections.abc import Callable
from typing import Any, TypeVar

from loom.bus.logs.discards import Discards
from loom.bus.natsio.one_shot import OneShot
from loom.bus.natsio.requests import Requests
from loom.bus.natsio.transport.message import Msg
from loom.schemas.base import Undecodable

T = TypeVar("T")


async def request_many(
    requests: Requests,
    subject: str,
    message: Any,
    read: Callable[[bytes], T | None],
    *,
    discards: Discards,
    window_s: float,
    enough: Callable[[list[T]], bool],
) -> list[T]:
    """Publish a request and return the replies, in order of arrival.

    Args:
        read: Decodes a reply. It raises Undecodable for a reply to be counted and left out, or returns None for one
            that it has counted itself.
        window_s: Longest wait, in seconds.
        enough: Whether to stop waiting; called after every reply with all replies, of which the new one is the last.

    Returns:
        The replies that arrived in time and could be decoded.
    """
    replies: list[T] = []
    ended: OneShot[bool] = OneShot()

    def on_reply(msg: Msg) -> None:
        if msg.status == "503":
            ended.set(True)
            return
        try:
            reply = read(msg.data)
        except Undecodable as error:
            discards.add("reply_undecodable", reason=error.message, subject=subject)
            return
        if reply is None:
            return
        replies.append(reply)
        if enough(replies):
            ended.set(True)

    inbox = requests.open_inbox(on_reply)
    try:
        await requests.connection.publish(subject, message, reply=inbox)
        await ended.wait(window_s)
    finally:
        requests.close_inbox(inbox)
    return replies
