"""A stream of submitted tasks, and a record of what was acknowledged and how each task ended."""

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.records import records
from loom.bus.topology import stream_state
from loom.schemas.base import new_id
from loom.schemas.errors import LoomError
from loom.schemas.record import TaskRecord
from loom.schemas.task import TaskAd, TaskState
from support.wait import until

AT_ONCE = 64
CANCELLED, DELEGATING, DIVIDED = 3, 5, 8
"""Last digits of the numbers of tasks that are cancelled, delegate or are divided."""
MIXED_PARTS = 3
LONGEST_BEFORE_CANCEL_S = 0.5


@dataclass
class Workload:
    """Submits tasks, and records which were acknowledged and how each first ended."""

    bus: Bus
    parts: int = 0
    """Subtasks of each task; `rng` draws their graphs."""
    mixed: bool = False
    """Whether of ten tasks one is cancelled soon, one delegates and one is divided."""
    rng: random.Random = field(default_factory=random.Random)
    accepted: set[str] = field(default_factory=set)
    refused: int = 0
    ended: dict[str, tuple[TaskState, float | None]] = field(default_factory=dict)
    """Task id -> state and time of its end, as first seen."""
    cancelled: set[str] = field(default_factory=set)
    """Tasks whose cancellation was acknowledged."""
    ended_twice: list[str] = field(default_factory=list)
    """Tasks whose end has changed."""

    async def submit(self, count: int, per_s: float) -> None:
        """Submit `count` tasks at that rate, every other one as a request to the submit subject."""
        slots = asyncio.Semaphore(AT_ONCE)

        async def submit_number(number: int) -> None:
            async with slots:
                await self._submit(number)

        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(submit_number(number))
                await asyncio.sleep(1 / per_s)

    def ad(self, number: int) -> TaskAd:
        """Return the ad with that number."""
        divided = MIXED_PARTS if self.mixed and number % 10 == DIVIDED else self.parts
        verb = "delegate" if self.mixed and number % 10 == DELEGATING else "entry"
        return TaskAd(
            task_id=new_id(),
            description=f"{verb} {number}",
            domain="code",
            wait=False,
            timeout_s=600,
            context=random_plan(divided, self.rng) if divided else {},
        )

    async def _submit(self, number: int) -> None:
        ad = self.ad(number)
        try:
            if number % 2:
                await task_client.request(self.bus, self.bus.subjects.submit, ad, timeout_s=8)
            else:
                await (await task_client.publish(self.bus, ad, deltas=False)).close()
        except (LoomError, TimeoutError):
            self.refused += 1  # perhaps stored, but nothing was promised
        else:
            self.accepted.add(ad.task_id)
            if self.mixed and number % 10 == CANCELLED:
                await self._cancel(ad.task_id)

    async def _cancel(self, task_id: str) -> None:
        """Cancel a task shortly after its submission; without an acknowledgement nothing is promised."""
        await asyncio.sleep(self.rng.uniform(0, LONGEST_BEFORE_CANCEL_S))
        try:
            await task_client.cancel(self.bus, task_id)
        except (LoomError, TimeoutError):
            return
        self.cancelled.add(task_id)

    async def watch(self) -> None:
        """Record the first end of each task; a different end later is a broken promise."""
        reader = records(self.bus).reader()
        while True:
            for entry in await reader.batch():
                self._record(entry.value)

    def _record(self, record: TaskRecord) -> None:
        if not record.ended:
            if record.task_id in self.ended:
                self.ended_twice.append(record.task_id)
            return
        end = (record.state, record.ended_at)
        if self.ended.setdefault(record.task_id, end) != end:
            self.ended_twice.append(record.task_id)

    async def settled(self, within_s: float) -> None:
        """Wait until every accepted task has ended and the work streams are empty."""

        async def nothing_left() -> bool:
            try:
                left = [(await stream_state(self.bus, name))["messages"] for name in ("INTAKE", "TASKS")]
            except LoomError:
                return False
            return not any(left) and self.accepted <= set(self.ended)

        try:
            await until(nothing_left, within_s=within_s, what="all accepted tasks end and the streams are empty")
        except AssertionError as error:
            open_ids = sorted(self.accepted - set(self.ended))
            raise AssertionError(f"{error}; {len(open_ids)} are open: {open_ids[:9]}") from None


def random_plan(parts: int, rng: random.Random) -> dict[str, Any]:
    """Return the context of an ad with a random graph of `parts` subtasks."""
    names = [f"s{n}" for n in range(parts)]
    plan = [
        {
            "id": name,
            "description": f"part {name}",
            "dependencies": rng.sample(names[:n], k=min(n, rng.randint(0, 2))),
        }
        for n, name in enumerate(names)
    ]
    rng.shuffle(plan)
    return {"plan": plan}


def chain(parts: int) -> dict[str, Any]:
    """Return the context of an ad with `parts` subtasks, each of which depends on the one before."""
    plan = [{"id": f"s{n}", "description": "nothing", "dependencies": [f"s{n - 1}"] if n else []} for n in range(parts)]
    return {"plan": plan}
