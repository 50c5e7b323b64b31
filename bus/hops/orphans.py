"""Messages that stay in the stream of hops although no consumer will ever deliver them, and their removal.

The server may keep a message that was acknowledged, and a client may store one where no consumer looks. Neither is work
in flight; they only take room on the disk.
"""

import asyncio
import random
from collections.abc import Mapping
from typing import NamedTuple

from loom.bus.bus import Bus
from loom.bus.hops.schedules import SCHEDULE
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.server_errors import Refused
from loom.bus.natsio.stored_message import read_message
from loom.bus.records import records
from loom.bus.topology import TASK_LANES, Lane, lane_infos, stream_state
from loom.schemas.base import Undecodable
from loom.schemas.errors import LoomError
from loom.schemas.tokens import is_token

log = get_logger()

SWEEP_S = 60.0
"""Seconds between two looks."""
MOST = 256
"""Messages one look reads."""
LEAST_AGE_S = 60.0
"""Younger messages are left alone: they may be on their way still."""


class Orphan(NamedTuple):
    """A message nothing will deliver."""

    seq: int
    subject: str


class Look(NamedTuple):
    """What one look has found."""

    orphans: list[Orphan]
    next_seq: int
    """Where the next look goes on; 1 after the last message."""


async def find(bus: Bus, *, start_seq: int = 1) -> Look:
    """Return the orphans among the next 256 messages of the stream of hops, oldest first.

    Raises:
        BusUnavailable: No answer.
        Refused: There is no such stream.
    """
    floors = {lane: int(info["ack_floor"]["stream_seq"]) for lane, info in (await lane_infos(bus)).items()}
    first = int((await stream_state(bus, "TASKS"))["first_seq"])
    seq, found, stream = max(start_seq, first), list[Orphan](), bus.subjects.stream("TASKS")
    for _ in range(MOST):
        message = await read_message(bus.jetstream, stream, {"seq": seq, "next_by_subj": bus.subjects.everything})
        if message is None or bus.clock.now() - message.stored_at < LEAST_AGE_S:
            return Look(found, 1)
        if await _is_orphan(bus, message.subject, message.seq, message.headers, floors):
            found.append(Orphan(message.seq, message.subject))
        seq = message.seq + 1
    return Look(found, seq)


async def _is_orphan(bus: Bus, subject: str, seq: int, headers: Mapping[str, str], floors: Mapping[Lane, int]) -> bool:
    parsed = bus.subjects.parse(subject)
    if parsed is not None and parsed.family == "later":
        return SCHEDULE not in headers
    lane = next((lane for lane in TASK_LANES if _takes(bus, lane, subject)), None)
    if lane is None:
        return True
    return seq <= floors.get(lane, 0) and await _has_ended(bus, subject.rpartition(".")[2])


def _takes(bus: Bus, lane: Lane, subject: str) -> bool:
    wanted, tokens = (bus.subjects.namespace, *lane.filter), subject.split(".")
    return len(wanted) == len(tokens) and all(want in ("*", token) for want, token in zip(wanted, tokens, strict=True))


async def _has_ended(bus: Bus, task_id: str) -> bool:
    """Whether the task has ended, or is not known any more."""
    if not is_token(task_id):
        return True
    try:
        entry = await records(bus).get(task_id)
    except Undecodable:
        return False
    return entry is None or entry.value.ended


async def sweep(bus: Bus) -> None:
    """Remove orphans, 256 messages looked at in a minute; runs until cancelled. Replicas may sweep side by side."""
    seq = 1
    while True:
        await asyncio.sleep(SWEEP_S * random.uniform(0.5, 1))  # noqa: S311 - replicas apart
        try:
            orphans, seq = await find(bus, start_seq=seq)
            for orphan in orphans:
                await _remove(bus, orphan)
        except LoomError as error:
            log.info("orphans_not_looked_for", **error_fields(error))


async def _remove(bus: Bus, orphan: Orphan) -> None:
    try:
        await bus.jetstream.api(
            f"STREAM.MSG.DELETE.{bus.subjects.stream('TASKS')}", {"seq": orphan.seq, "no_erase": True}
        )
    except Refused as refusal:  # another replica was faster
        log.debug("orphan_gone", seq=orphan.seq, reason=refusal.message)
    else:
        log.warning("orphan_removed", subject=orphan.subject, seq=orphan.seq)
