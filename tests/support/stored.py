"""Tasks whose records and rewards a store is to keep."""

from loom import TaskAd
from loom.bus.bus import Bus
from loom.bus.queries import recent_records
from loom.schemas.learning.profile import NodeProfile

TASKS = 30


def ads(count: int = TASKS) -> list[TaskAd]:
    return [TaskAd(task_id=f"t{number}", domain="code", description="sort") for number in range(count)]


async def learned(bus: Bus) -> int:
    entry = await bus.bucket("nodes", NodeProfile).get("local.coder")
    return entry.value.total_tasks if entry is not None else 0


async def everything_is_there(bus: Bus) -> None:
    records = await recent_records(bus, limit=100)
    assert {(each.task_id, each.state) for each in records} >= {(ad.task_id, "succeeded") for ad in ads()}
    assert await learned(bus) == TASKS
