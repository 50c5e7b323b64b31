"""Scheduled messages, which the server moves to a phase at a later time, and the phases that may schedule them.

The server moves a scheduled message to any subject of its stream, whatever the publisher's permissions. Therefore the
receiving phase checks the subject of the schedule, which the server writes into a header.
"""

from collections.abc import Mapping

from loom.bus.natsio.transport.message import Msg
from loom.schemas.envelope import Phase

SCHEDULE = "Nats-Schedule"
TARGET = "Nats-Schedule-Target"
SCHEDULER = "Nats-Scheduler"
"""Header with the subject of the schedule that moved a message. The server refuses messages of clients with this
header, but only in this spelling."""
_SCHEDULER = SCHEDULER.encode()

SCHEDULERS: Mapping[Phase, frozenset[Phase]] = {
    "sense": frozenset({"sense"}),
    "match": frozenset({"match", "evaluate"}),
    "scale": frozenset({"scale"}),
    "execute": frozenset({"execute"}),
    "evaluate": frozenset({"evaluate"}),
    "adapt": frozenset(),
}
"""Phase -> the phases that may schedule messages for it."""


def may_schedule(scheduler: str, target: str) -> bool:
    """Return whether a schedule may move its message to a subject: the phases fit, and the task is the same one.

    Args:
        scheduler: Subject of the schedule, `<namespace>.later.<phase>.<task_id>.<origin>`.
        target: Subject of the hop, `<namespace>.task.<phase>.<priority>.<task_id>`.
    """
    match scheduler.split("."), target.split("."):
        case [own, "later", by, waiting, _], [namespace, "task", phase, _, task_id]:
            allowed: Mapping[str, frozenset[Phase]] = SCHEDULERS  # type: ignore[assignment]  # keys of any text
            return own == namespace and waiting == task_id and by in allowed.get(phase, ())
        case _:
            return False


def forbidden_scheduler(msg: Msg) -> str | None:
    """Return the subject of the schedule that moved `msg` without permission; None for any other message."""
    if _SCHEDULER not in msg.raw_headers:
        return None
    scheduler = msg.headers.get(SCHEDULER)
    return None if scheduler is None or may_schedule(scheduler, msg.subject) else scheduler
