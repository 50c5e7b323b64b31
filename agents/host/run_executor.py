"""Executes the runs of a host: starts them in free slots, ends them, and frees the slots of runs that do not end."""

import asyncio
import time
from collections.abc import Callable, Iterable
from contextvars import copy_context
from functools import partial
from typing import Any

from loom.agents.abandonable import Abandonable
from loom.agents.host import run_table
from loom.agents.host.clone import SpawnedNode
from loom.agents.host.delegation import Delegator
from loom.agents.host.hosted_agents import HostedAgents
from loom.agents.host.run_table import RunTable
from loom.agents.host.runs import Run
from loom.agents.host.slots import Node, RunQueue, RunQueues
from loom.agents.lifetime import has_lifetime
from loom.agents.protocol import StreamingAgent, collect, failed, raised
from loom.agents.run_context import as_current_run
from loom.agents.user_code import ends_task
from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.schemas.errors import AgentFailed, LoomError
from loom.schemas.run import RunKind
from loom.schemas.task import RunResult, TaskError

log = get_logger()

CLEAN_UP_S = 1.0
"""Seconds that cancelled runs have to end when their host stops; then they are abandoned."""


class RunExecutor:
    """Executes the runs of one host in the slots of its nodes.

    Args:
        find_node: Returns the node with an id, or None if it has left.
        queues: The run queues of the nodes.
        table: The runs of the host.
        on_place_free: Called when a node that refused a run accepts runs again.
        cancel_grace_s: Seconds after which a run that ignores its cancel loses its slot.
    """

    def __init__(
        self,
        bus: Bus,
        find_node: Callable[[str], Node | None],
        queues: RunQueues,
        table: RunTable,
        on_place_free: Callable[[], None],
        *,
        cancel_grace_s: float,
    ) -> None:
        self._bus = bus
        self._find_node = find_node
        self._queues = queues
        self._table = table
        self._on_place_free = on_place_free
        self._cancel_grace_s = cancel_grace_s
        self._refused: set[str] = set()
        """Nodes that have refused a run since they last had a free place."""
        self._context = copy_context()
        self._agents = HostedAgents(self._context)

    # -- starting

    def enqueue(self, run: Run, node: Node) -> bool:
        """Queue a run and start it if a slot is free; return False if the node does not accept it."""
        queue = self._queues.get_or_create(node.id)
        if node.status == "dying" or not queue.accepts(run.request.priority):
            return False
        self._table.add(run)
        queue.enqueue(run)
        queued = max(0, queue.queued - (queue.slots - len(queue.running)))
        run.emit("accepted", at_once=True, queued=queued)  # its agent may not return to the event loop for long
        self._start_queued(node.id, queue, node)
        return True

    def refuse(self, run: Run) -> None:
        """Reject a run because its node is busy; `on_place_free` is called when the node accepts runs again."""
        self._refused.add(run.request.node_id)
        run.emit("rejected", code="busy")

    def start_queued(self, node_id: str) -> None:
        """Start queued runs in free slots, and update the load and status of the node."""
        self._start_queued(node_id, self._queues.get_or_create(node_id), self._find_node(node_id))

    def _start_queued(self, node_id: str, queue: RunQueue, node: Node | None) -> None:
        while not self._bus.connection.closing and (run := queue.start_next()) is not None:
            if run.left_s <= 0:  # its deadline passed in the backlog
                self.stop([run], run_table.LATE)  # calls this method again
                return
            # In the host's context: the current context belongs to the run that freed the slot.
            run.work = self._context.run(self._bus.tasks.spawn, self._execute(run), name=f"run {run.request.key}")
            run.work.add_done_callback(partial(self._on_work_done, run, queue))
        if node_id in self._refused and queue.load < 1:
            self._refused.discard(node_id)
            self._on_place_free()
        self._show_load(node_id, queue, node)

    def _show_load(self, node_id: str, queue: RunQueue, node: Node | None) -> None:
        """Write a queue's load and status to its node; remove the queue and the agent of a node that has left."""
        if node is None:
            if not queue.has_work:
                self._queues.remove(node_id)
                self._agents.remove(node_id)
            return
        node.load = queue.load
        if node.status != "dying":
            node.status = "busy" if queue.busy else "idle"
        if isinstance(node, SpawnedNode):
            node.has_work = queue.has_work

    # -- executing

    async def _execute(self, run: Run) -> None:
        """Execute a run and emit its final event."""
        run.emit("started")
        run.agent = Abandonable(self._call_agent(run))
        try:
            error, result = await run.agent
        except asyncio.CancelledError:
            if run.agent.cancelled_itself:
                self.end(run, "error", error=run_table.CANCELLED_ITSELF)
            raise
        self.end(run, "result" if error is None else "error", error=error, result=result)

    async def _call_agent(self, run: Run) -> tuple[TaskError | None, RunResult | None]:
        """Call the agent and return its error, if it failed, and its result; only a cancellation is raised."""
        job = run.request
        try:
            node = self._present_node(job.node_id)
            agent, given = self._agents.agent_of(node), node.agent
            if not has_lifetime(given):
                return await self._collect(run, agent)
            async with self._agents.started(given):
                return await self._collect(run, agent)
        except LoomError as error:
            return failed(error, job)
        except BaseException as error:  # user code may raise anything
            if ends_task(error):
                raise
            return failed(raised(error, job), job)

    def _present_node(self, node_id: str) -> Node:
        node = self._find_node(node_id)
        if node is None:
            raise AgentFailed("the node left before the run began")
        return node

    async def _collect(self, run: Run, agent: StreamingAgent) -> tuple[TaskError | None, RunResult]:
        """Return the result of an agent, and an error if the run has used too many tokens."""
        node_id = run.request.node_id
        queue = self._queues.get_or_create(node_id)
        delegator = Delegator(run, queue, partial(self.start_queued, node_id))
        with as_current_run(delegator):
            result = await collect(agent, run.request, run.emit_progress, run_context=delegator, remaining_s=run.left_s)
        queue.record_usage(result)
        return delegator.overspent(result), result

    def _on_work_done(self, run: Run, queue: RunQueue, work: asyncio.Task[None]) -> None:
        """Free the slot of a run. A callback does this because a task cancelled before its first step runs no code."""
        if run.final_event is None:
            self.end(run, "error", error=run_table.STOPPING if work.cancelled() else run_table.NOT_ENDED)
        self._table.forget(run)
        queue.remove(run)
        self.start_queued(run.request.node_id)

    # -- ending

    def end(self, run: Run, kind: RunKind, **fields: Any) -> None:
        """Emit the final event of a run once, keep it for repeated requests, and cancel the run if it still works."""
        if run.final_event is None:
            run.emit(kind, **{**fields, "result": run.with_delegated_usage(fields.get("result"))})
            self._table.keep_final_event(run)
        self._table.end(run)
        if run.work is None:
            self._queues.get_or_create(run.request.node_id).remove(run)
            self.start_queued(run.request.node_id)
        elif run.work is not asyncio.current_task() and not run.work.done():
            self._table.cancelled.setdefault(run, time.monotonic())
            run.work.cancel()

    def stop(self, runs: Iterable[Run], reason: TaskError) -> None:
        """End runs with an error."""
        for run in runs:
            self.end(run, "error", error=reason)

    async def heartbeat(self) -> None:
        """Emit heartbeats of active runs, end late runs, and free the slots of runs that ignore their cancel."""
        for run in self._table.active():
            if run.left_s > 0:
                run.emit("heartbeat")
            else:
                self.stop([run], run_table.LATE)
        give_up_before = time.monotonic() - self._cancel_grace_s
        for run in [run for run, at in self._table.cancelled.items() if at <= give_up_before]:
            self._give_up(run)

    def _give_up(self, run: Run) -> None:
        """Abandon the code of a run that has ignored its cancel, and free its slot."""
        del self._table.cancelled[run]
        self._table.stuck.add(run)
        request = run.request
        log.warning("run_ignores_cancel", task_id=request.task_id, node_id=request.node_id, attempt=request.attempt)
        _abandon(run)
        self._queues.get_or_create(request.node_id).remove(run)
        self.start_queued(request.node_id)

    # -- stopping the host

    async def wait_for_cancelled(self) -> None:
        """Wait up to CLEAN_UP_S for cancelled runs to end."""
        cancelled = [run.work for run in self._table.cancelled if run.work is not None]
        if cancelled:
            await asyncio.wait(cancelled, timeout=CLEAN_UP_S)

    async def close_agents(self) -> None:
        """Close the agents of all nodes."""
        await self._agents.close()

    def abandon(self) -> None:
        """Abandon all runs that still work: their code is not resumed."""
        for run in self._table.working():
            _abandon(run)

    def abort(self, abandon: Callable[[], None]) -> None:
        """Release the agents, and call `abandon` in the event loop of each working run after CLEAN_UP_S."""
        self._agents.release()
        runs = [*self._table.active(), *self._table.cancelled]
        loops = {run.work.get_loop() for run in runs if run.work is not None}
        for loop in loops:
            if not loop.is_closed():
                loop.call_later(CLEAN_UP_S, abandon)


def _abandon(run: Run) -> None:
    """Do not resume the user's code of a run again."""
    if run.agent is not None and run.work is not None:
        run.agent.abandon()
        run.work.cancel()
