"""The node protocol of a host, and the slots and run queue of each node."""

import heapq
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import count, takewhile
from typing import Any, Protocol

from loom.agents.host.runs import Run
from loom.schemas.auction import Bid
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.task import PRIORITIES, Priority, RunResult

SMOOTHING = 0.3
"""Weight of the newest run in expected tokens and seconds."""
URGENT = ("high", "critical")
RESERVED_SHARE = 5
"""One place in five of the backlog is reserved for urgent runs.

Half of the reserve also accepts runs that were awarded before the full load was announced.
"""


class Node(Protocol):
    """The interface of a hosted node; `loom.types.AgentNode` implements it."""

    id: str
    agent: Any
    status: Any
    load: float

    def to_bid(self, *, domain: str, required_tools: Collection[str] = ()) -> Bid:
        """Return the node's bid: self-rating, load and tools."""
        ...

    def claim(self, domain: str) -> float:
        """Return the node's self-rating in a domain.

        Args:
            domain: A domain token, or any wording of the domain.

        Returns:
            0 to 1; a node does not bid in a domain that it rates 0.
        """
        ...

    def named_domains(self) -> Collection[str]:
        """Return the domains, in any wording, that the node rates above 0 or is limited to."""
        ...

    def tool_names(self) -> Collection[str]:
        """Return the names of the node's tools."""
        ...

    def has_tools(self, required: Collection[str]) -> bool:
        """Return whether the node has all of these tools; a node that lacks one does not bid."""
        ...

    def mirror(self, profile: NodeProfile) -> None:
        """Copy a learned profile into the node."""
        ...


class NodeIndex:
    """Finds a host's nodes by id while nodes join and leave.

    Args:
        nodes: Returns the current nodes.
    """

    def __init__(self, nodes: Callable[[], Sequence[Node]]) -> None:
        self._nodes = nodes
        self._places: dict[str, int] = {}
        """Node id -> its position in the list at the last lookup."""

    def get(self, node_id: str) -> Node | None:
        """Return the node with that id, or None."""
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
    """The slots and the backlog of one node; the last fifth of the backlog is reserved for urgent runs.

    A run that waits for delegated work holds no slot, because the delegated work may need that slot.

    Args:
        slots: Runs that work at once.
        backlog: Runs that wait for a slot.
        on_change: Called after each change of the load.
    """

    def __init__(self, slots: int, backlog: int, on_change: Callable[[], None] = lambda: None) -> None:
        self.slots = slots
        self.backlog = backlog
        self._on_change = on_change
        self._open_places = slots + backlog - backlog // RESERVED_SHARE
        self.running: set[Run] = set()
        self.suspended: set[Run] = set()
        """Started runs without a slot: they wait for delegated work, or for a slot after it."""
        self._resuming: deque[Run] = deque()
        self.expected_tokens = 0.0
        self.expected_s = 0.0
        self._queue: list[tuple[int, int, Run]] = []
        self._order = count()

    @property
    def queued(self) -> int:
        """Number of runs that wait for a slot."""
        return len(self._queue) + len(self._resuming)

    @property
    def busy(self) -> bool:
        """Whether a run has started and not ended."""
        return bool(self.running or self.suspended)

    @property
    def has_work(self) -> bool:
        """Whether a run is queued, or has started and not ended."""
        return self.busy or self.queued > 0

    @property
    def full(self) -> bool:
        """Whether there is no place for another run of any priority."""
        return len(self.running) >= self.slots and self.queued >= self.backlog

    @property
    def load(self) -> float:
        """Share of the places open to every priority that are taken, 0 to 1; at 1 only urgent runs are accepted."""
        return min(1.0, (len(self.running) + self.queued) / self._open_places)

    def accepts(self, priority: Priority) -> bool:
        """Return whether there is a place for another run of this priority."""
        running, queued = len(self.running), self.queued
        if running >= self.slots and queued >= self.backlog:
            return False
        late_places = self.backlog // RESERVED_SHARE // 2
        return running + queued < self._open_places + late_places or priority in URGENT

    def enqueue(self, run: Run) -> None:
        """Add a run behind all runs of the same or a higher priority."""
        heapq.heappush(self._queue, (-PRIORITIES.index(run.request.priority), next(self._order), run))
        self._on_change()

    def start_next(self) -> Run | None:
        """Give free slots to resuming runs, then one to the most urgent queued run.

        Returns:
            The queued run that got a slot, or None.
        """
        while self._resuming and len(self.running) < self.slots:
            run = self._resuming.popleft()
            self.suspended.discard(run)
            self.running.add(run)
            run.has_slot.set()
        if not self._queue or len(self.running) >= self.slots:
            return None
        run = heapq.heappop(self._queue)[2]
        self.running.add(run)
        return run

    def suspend(self, run: Run) -> None:
        """Free the slot of a run that waits for delegated work."""
        self.remove(run)
        self.suspended.add(run)
        run.has_slot.clear()

    def resume(self, run: Run) -> None:
        """Queue a suspended run for the next free slot; `run.has_slot` is set when it gets one."""
        self._resuming.append(run)
        self._on_change()

    def remove(self, run: Run) -> None:
        """Free the slot or the queue place of a run."""
        if run.work is None:
            self._queue = [queued for queued in self._queue if queued[2] is not run]
            heapq.heapify(self._queue)
        self.running.discard(run)
        self.suspended.discard(run)
        if run in self._resuming:
            self._resuming.remove(run)
        self._on_change()

    def record_usage(self, result: RunResult) -> None:
        """Update the expected tokens and seconds of a run with those of a result."""
        first = not self.expected_s
        weight = 1.0 if first else SMOOTHING
        self.expected_tokens += weight * (result.tokens - self.expected_tokens)
        self.expected_s += weight * (result.duration_s - self.expected_s)

    def bid(self, node: Node, domain: str, required_tools: Collection[str]) -> Bid:
        """Return the node's bid with the load and the expected costs of this queue."""
        offer = node.to_bid(domain=domain, required_tools=required_tools)
        queued = self.queued
        taken = len(self.running) + queued
        return Bid(
            node_id=offer.node_id,
            self_rating=offer.self_rating,
            load=min(1.0, taken / self._open_places),
            tools=offer.tools,
            expected_tokens=int(self.expected_tokens),
            expected_s=self.expected_s,
            backlog=queued,
            free=max(0, self._open_places - taken),
        )


class RunQueues:
    """The run queues of a host's nodes; a node gets one with its first run.

    Args:
        slots: Runs that each node works on at once.
        backlog: Runs that wait for a slot of each node.
    """

    def __init__(self, slots: int, backlog: int) -> None:
        self.slots = slots
        self.backlog = backlog
        self.by_node: dict[str, RunQueue] = {}
        """Node id -> its queue, for nodes that have had a run."""
        self._empty = RunQueue(slots, backlog)
        self.changes = 0
        """Number of changes of loads so far."""
        self._changed: dict[str, int] = {}
        """Node id -> number of the last change of its load, in ascending order."""

    def get(self, node_id: str) -> RunQueue:
        """Return the queue of a node to read; nodes without a run share an empty one."""
        return self.by_node.get(node_id, self._empty)

    def get_or_create(self, node_id: str) -> RunQueue:
        """Return the queue of a node to change."""
        if node_id not in self.by_node:
            self.by_node[node_id] = RunQueue(self.slots, self.backlog, partial(self._count_change, node_id))
        return self.by_node[node_id]

    def remove(self, node_id: str) -> None:
        """Delete the queue of a node that has left."""
        del self.by_node[node_id]
        self._changed.pop(node_id, None)

    def changed_since(self, changes: int) -> list[str]:
        """Return the ids of the nodes whose load has changed since `self.changes` had this value."""
        return [node_id for node_id, _ in takewhile(lambda item: item[1] > changes, reversed(self._changed.items()))]

    def _count_change(self, node_id: str) -> None:
        self.changes += 1
        self._changed.pop(node_id, None)
        self._changed[node_id] = self.changes
