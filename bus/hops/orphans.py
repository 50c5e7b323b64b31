"""Orphans: messages of the stream of hops that no consumer will deliver, and their removal.

The server may keep a message that was acknowledged, and a client may store one on a subject without a consumer. Both
only take disk space.
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
from loom.bus.natsio.stored_message import next_message
from loom.bus.records import records
from loom.bus.topology import TASK_LANES, Lane, lane_infos, stream_state
from loom.schemas.base import Undecodable
from loom.schemas.errors import LoomError
from loom.schemas.tokens import is_token

log = get_logger()

SWEEP_S = 60.0
"""Longest pause between two passes, in seconds."""
MAX_MESSAGES = 256
"""Messages that one pass reads."""
LEAST_AGE_S = 60.0
"""Younger messages are ignored: they may not have been delivered yet."""


class Orphan(NamedTuple):
    """A message that no consumer will deliver."""

    seq: int
    subject: str


class OrphanPage(NamedTuple):
    """The orphans among 256 messages of the stream."""

    orphans: list[Orphan]
    next_seq: int
    """First sequence of the next page; 1 after the last message."""


async def find_orphans(bus: Bus, *, start_seq: int = 1) -> OrphanPage:
    """Return the orphans among the next 256 messages of the stream of hops, oldest first.

    Raises:
        BusUnavailable: The server does not answer.
        Refused: The stream does not exist.
    """
    floors = {lane: int(info["ack_floor"]["stream_seq"]) for lane, info in (await lane_infos(bus)).items()}
    first = int((await stream_state(bus, "TASKS"))["first_seq"])
    seq, orphans, stream = max(start_seq, first), list[Orphan](), bus.subjects.stream("TASKS")
    for _ in range(MAX_MESSAGES):
        message = await next_message(bus.jetstream, stream, bus.subjects.everything, seq)
        if message is None or bus.clock.now() - message.stored_at < LEAST_AGE_S:
            return OrphanPage(orphans, 1)
        if await _is_orphan(bus, message.subject, message.seq, message.headers, floors):
            orphans.append(Orphan(message.seq, message.subject))
        seq = message.seq + 1
    return OrphanPage(orphans, seq)


async def _is_orphan(bus: Bus, subject: str, seq: int, headers: Mapping[str, str], floors: Mapping[Lane, int]) -> bool:
    parsed = bus.subjects.parse(subject)
    if parsed is not None and parsed.family == "later":
        return SCHEDULE not in headers
    lane = next((lane for lane in TASK_LANES if _matches(bus, lane, subject)), None)
    if lane is None:
        return True
    return seq <= floors.get(lane, 0) and await _has_ended(bus, subject.rpartition(".")[2])


def _matches(bus: Bus, lane: Lane, subject: str) -> bool:
    pattern, tokens = (bus.subjects.namespace, *lane.filter), subject.split(".")
    return len(pattern) == len(tokens) and all(
        part in ("*", token) for part, token in zip(pattern, tokens, strict=True)
    )


async def _has_ended(bus: Bus, task_id: str) -> bool:
    """Return whether the task has ended, or has no record any more."""
    if not is_token(task_id):
        return True
    try:
        entry = await records(bus).get(task_id)
    except Undecodable:
        return False
    return entry is None or entry.value.ended


async def sweep(bus: Bus) -> None:
    """Remove orphans, with one pass of 256 messages a minute; runs until cancelled, in several replicas if need be."""
    seq = 1
    while True:
        await asyncio.sleep(SWEEP_S * random.uniform(0.5, 1))  # noqa: S311 - jitter
        try:
            orphans, seq = await find_orphans(bus, start_seq=seq)
            for orphan in orphans:
                await _remove(bus, orphan)
        except LoomError as error:
            log.info("orphan_sweep_failed", **error_fields(error))


async def _remove(bus: Bus, orphan: Orphan) -> None:
    try:
        await bus.jetstream.api(
            f"STREAM.MSG.DELETE.{bus.subjects.stream('TASKS')}", {"seq": orphan.seq, "no_erase": True}
        )
    except Refused as refusal:  # another replica has removed it
        log.debug("orphan_gone", seq=orphan.seq, reason=refusal.message)
    else:
        log.warning("orphan_removed", subject=orphan.subject, seq=orphan.seq)
