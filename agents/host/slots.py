"""A hosted node: what a host needs of it, and how much of it is taken."""

import heapq
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import count
from typing import Any, Protocol

from loom.agents.host.runs import Run
from loom.schemas.auction import Bid
from loom.schemas.learning import NodeProfile
from loom.schemas.task import PRIORITIES, Priority, RunResult

SMOOTHING = 0.3
"""Weight of the newest run in expected tokens and seconds."""
URGENT = ("high", "critical")
KEPT = 5
"""One in so many places of the backlog is kept for urgent runs; half of these, too, for runs awarded meanwhile."""


class Node(Protocol):
    """What a host needs of a node; `loom.types.AgentNode` is one."""

    id: str
    agent: Any
    status: Any
    load: float

    def to_bid(self, *, domain: str, required_tools: Collection[str] = ()) -> Bid:
        """Return its offer: claim, load and tools."""
        ...

    def claim(self, domain: str) -> float:
        """Return its own rating in `domain`, a domain_token or any wording of it: 0 to 1, the claim of its offer.

        At 0 it does not take the domain: it bids on no such task.
        """
        ...

    def named_domains(self) -> Collection[str]:
        """Return the domains, in any wording, that it rates itself above 0 in or is limited to."""
        ...

    def tool_names(self) -> Collection[str]:
        """Return the names of the tools it has."""
        ...

    def has_tools(self, required: Collection[str]) -> bool:
        """Return whether it has all of these tools: without them it does not bid."""
        ...

    def mirror(self, profile: NodeProfile) -> None:
        """Take over what has been learned about it."""
        ...


class NodeIndex:
    """Finds a host's nodes by id, however they come and go.

    Args:
        nodes: Returns the nodes there are now.
    """

    def __init__(self, nodes: Callable[[], Sequence[Node]]) -> None:
        self._nodes = nodes
        self._places: dict[str, int] = {}
        """Where among the nodes one was when last looked for."""

    def get(self, node_id: str) -> Node | None:
        """Return the node of that id, if there is one."""
        nodes = self._nodes()
        place = self._places.get(node_id, 0)
        if place < len(nodes) and nodes[place].id == node_id:
            return nodes[place]
        for place, node in enumerate(nodes):
            if node.id == node_id:
                self._places[node_id] = place
                return node
        self._places.pop(node_id, None)
        return None


class RunQueue:
    """The slots and the backlog of one node; the last fifth of the backlog is for urgent runs.

    A run that waits for work it has delegated holds no slot: it may be what the slot is needed for.
    """

    def __init__(self, slots: int, backlog: int) -> None:
        self.slots = slots
        self.backlog = backlog
        self._open = slots + backlog - backlog // KEPT
        self.running: set[Run] = set()
        self.away: set[Run] = set()
        """Runs that have begun and hold no slot: they wait for others, or for their slot back."""
        self._returning: deque[Run] = deque()
        self.expected_tokens = 0.0
        self.expected_s = 0.0
        self._queue: list[tuple[int, int, Run]] = []
        self._order = count()

    @property
    def queued(self) -> int:
        """Runs that wait for a slot."""
        return len(self._queue) + len(self._returning)

    @property
    def busy(self) -> bool:
        """Whether a run has begun and not ended."""
        return bool(self.running or self.away)

    @property
    def has_work(self) -> bool:
        """Whether a run is queued, or has begun and not ended, waiting for others perhaps."""
        return self.busy or self.queued > 0

    @property
    def full(self) -> bool:
        """Whether one more run would have no place, however urgent."""
        return len(self.running) >= self.slots and self.queued >= self.backlog

    @property
    def load(self) -> float:
        """Taken places as a share of those any run may have, 0 to 1; at 1 only an urgent run is taken."""
        return min(1.0, (len(self.running) + self.queued) / self._open)

    def takes(self, priority: Priority) -> bool:
        """Whether there is a place for one more run of this priority."""
        late = self.backlog // KEPT // 2
        return not self.full and (len(self.running) + self.queued < self._open + late or priority in URGENT)

    def enqueue(self, run: Run) -> None:
        """Add a run behind all of its priority."""
        heapq.heappush(self._queue, (-PRIORITIES.index(run.request.priority), next(self._order), run))

    def next(self) -> Run | None:
        """Take the most urgent run that has a slot, or None; those that had one before get theirs first."""
        while self._returning and len(self.running) < self.slots:
            run = self._returning.popleft()
            self.away.discard(run)
            self.running.add(run)
            run.seated.set()
        if not self._queue or len(self.running) >= self.slots:
            return None
        run = heapq.heappop(self._queue)[2]
        self.running.add(run)
        return run

    def leave(self, run: Run) -> None:
        """Free the slot of a run that waits for others, if it has one."""
        self.forget(run)
        self.away.add(run)
        run.seated.clear()

    def come_back(self, run: Run) -> None:
        """Have the next free slot given to a run that has waited; `run.seated` tells when."""
        self._returning.append(run)

    def forget(self, run: Run) -> None:
        """Free whatever place a run has."""
        if run.work is None:
            self._queue = [queued for queued in self._queue if queued[2] is not run]
            heapq.heapify(self._queue)
        self.running.discard(run)
        self.away.discard(run)
        if run in self._returning:
            self._returning.remove(run)

    def learn(self, result: RunResult) -> None:
        """Adjust what a run is expected to take."""
        first = not self.expected_s
        weight = 1.0 if first else SMOOTHING
        self.expected_tokens += weight * (result.tokens - self.expected_tokens)
        self.expected_s += weight * (result.duration_s - self.expected_s)

    def bid(self, node: Node, domain: str, required_tools: Collection[str]) -> Bid:
        """Return the node's bid with the room's numbers."""
        offer = node.to_bid(domain=domain, required_tools=required_tools)
        return Bid(
            node_id=offer.node_id,
            self_rating=offer.self_rating,
            load=self.load,
            tools=offer.tools,
            expected_tokens=int(self.expected_tokens),
            expected_s=self.expected_s,
            backlog=self.queued,
            free=max(0, self._open - len(self.running) - self.queued),
        )
