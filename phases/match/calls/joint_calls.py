"""Collects the tasks that can share one call for bids."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field

from loom.bus.natsio.background_tasks import BackgroundTasks
from loom.phases.match.announced_nodes import TaskRequirements
from loom.phases.match.ranked_bids import AuctionResult
from loom.schemas.auction import MAX_LOTS
from loom.schemas.envelope import Envelope, Spec
from loom.schemas.task import PRIORITIES


@dataclass(eq=False)
class AuctionedTask:
    """A task of a call."""

    envelope: Envelope
    spec: Spec
    result: asyncio.Future[AuctionResult] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Set once the task is decided; cancelled if its message is handed back before."""

    @property
    def requirements(self) -> TaskRequirements:
        """What the task requires of a node."""
        ad = self.envelope.ad
        return TaskRequirements(self.spec.domain_token, frozenset(ad.required_tools), self.envelope.excluded)

    @property
    def rank(self) -> tuple[int, float]:
        """Sort key: by priority, the most urgent first, then by age."""
        hops = self.envelope.hops
        return -PRIORITIES.index(self.envelope.priority), hops[0].started if hops else 0.0


class JointCalls:
    """Collects the tasks that are alike and arrive in one turn of the event loop, at most 16, for one call.

    Args:
        tasks: Background tasks of the bus.
        hold: Holds the auction of a group of tasks, and sets the result of each.
    """

    def __init__(self, tasks: BackgroundTasks, hold: Callable[[Sequence[AuctionedTask]], Awaitable[None]]) -> None:
        self._tasks = tasks
        self._hold = hold
        self._groups: dict[Hashable, list[AuctionedTask]] = {}
        """Domain, tools and the other facts that the tasks of a call share -> the tasks of this turn."""

    async def join(self, alike: Hashable, task: AuctionedTask) -> AuctionResult:
        """Return the result of the task's auction.

        Args:
            alike: Equal for tasks that can share a call.
        """
        group = self._groups.get(alike)
        if group is None or len(group) == MAX_LOTS:
            group = self._groups[alike] = []
            asyncio.get_running_loop().call_soon(self._close, alike, group)
        group.append(task)
        return await task.result

    def _close(self, alike: Hashable, group: list[AuctionedTask]) -> None:
        if self._groups.get(alike) is group:
            del self._groups[alike]
        self._tasks.spawn(self._hold_and_set(group), name="auction")

    async def _hold_and_set(self, group: list[AuctionedTask]) -> None:
        """Hold the auction; an error reaches each task without a result, whose message is then delivered again."""
        try:
            await self._hold(group)
        except Exception as error:  # noqa: BLE001 - each task's handler raises it again
            for task in group:
                if not task.result.done():
                    task.result.set_exception(error)
        finally:
            for task in group:
                task.result.cancel()
