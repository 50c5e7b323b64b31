"""Task records: read and change by compare-and-set."""

import asyncio
import random
from collections.abc import Callable

from loom.bus.client import Bus, Conflict
from loom.bus.kv import Bucket, Entry
from loom.schemas.envelope import TaskRecord
from loom.schemas.errors import BusUnavailable

TRIES = 16  # writers of one record are few; more than this is not contention


def records(bus: Bus) -> Bucket[TaskRecord]:
    """Return the bucket of task records."""
    return Bucket(bus, "records", TaskRecord)


async def change(
    bucket: Bucket[TaskRecord], task_id: str, decide: Callable[[TaskRecord], TaskRecord | None]
) -> Entry[TaskRecord] | None:
    """Apply `decide` to the record until nobody else wrote in between.

    Args:
        decide: Pure. Returns the new record, or None to leave it as it is.

    Returns:
        The record as it now is; None when there is none.

    Raises:
        BusUnavailable: The record would not hold still.
    """
    for _ in range(TRIES):
        entry = await bucket.get(task_id)
        if entry is None:
            return None
        wanted = decide(entry.value)
        if wanted is None:
            return entry
        try:
            return Entry(task_id, wanted, await bucket.update(task_id, wanted, entry.revision))
        except Conflict:
            await asyncio.sleep(random.uniform(0, 0.01))  # noqa: S311 - apart from the others who lost the race
    raise BusUnavailable(f"record {task_id} was changed by others {TRIES} times in a row")
