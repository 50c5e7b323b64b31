"""The runs of a host: active, cancelled and ended ones."""

import time
from collections import OrderedDict

from loom.agents.host.runs import Run, RunKey
from loom.schemas.base import encode
from loom.schemas.run import RunEvent, RunRequest, Stop
from loom.schemas.task import TaskError

CANCELLED = TaskError(code="cancelled", message="the run was stopped")
LATE = TaskError(code="deadline_exceeded", message="the deadline passed before the run was over")
NOT_ENDED = TaskError(code="agent_failed", message="the run failed in its host, whose log has the reason")
CANCELLED_ITSELF = TaskError(code="agent_failed", message="the agent cancelled its own run")
STOPPING = TaskError(code="node_busy", message="the host is stopping")

STOPPED_S = 60.0
MAX_STOPPED = 10_000
FINISHED_S = 600.0
FINISHED_BYTES = 32 * 1024 * 1024


class RunTable:
    """Finds a host's runs by task and attempt, and keeps the ends of runs for repeated requests."""

    def __init__(self) -> None:
        self._active: dict[str, dict[int, Run]] = {}
        """Task id -> attempt -> its run, until the run has ended."""
        self.cancelled: dict[Run, float] = {}
        """Cancelled runs whose code still works -> monotonic time of the cancel."""
        self.stuck: set[Run] = set()
        """Runs whose code still works although their slots were freed."""
        self._finished = FinishedRuns()
        self._stopped = StoppedAttempts()

    def active(self) -> list[Run]:
        """Return the runs that have not ended; may be called from another thread."""
        return [run for attempts in list(self._active.values()) for run in list(attempts.values())]

    def working(self) -> list[Run]:
        """Return all runs whose code may still work, ended or not."""
        return [*self.active(), *self.cancelled, *self.stuck]

    def get(self, request: RunRequest | Stop) -> Run | None:
        """Return the active run of a request's task and attempt."""
        return self._active.get(request.task_id, {}).get(request.attempt)

    def earlier_attempts(self, request: RunRequest) -> list[Run]:
        """Return the active runs of the same task with a lower attempt."""
        attempts = self._active.get(request.task_id, {})
        return [run for attempt, run in attempts.items() if attempt < request.attempt]

    def final_event(self, request: RunRequest) -> bytes | None:
        """Return the encoded last event of a run that has ended or was stopped before its request came."""
        key = (request.task_id, request.attempt)
        event = self._finished.get(key)
        if event is None and key in self._stopped:
            event = encode(RunEvent(seq=0, kind="error", error=CANCELLED))
        return event

    def add(self, run: Run) -> None:
        """Add an active run."""
        self._active.setdefault(run.request.task_id, {})[run.request.attempt] = run

    def end(self, run: Run) -> None:
        """Remove a run from the active ones."""
        attempts = self._active.get(run.request.task_id, {})
        if attempts.pop(run.request.attempt, None) is not None and not attempts:
            del self._active[run.request.task_id]

    def keep_final_event(self, run: Run) -> None:
        """Keep the last event of a run for repeated requests."""
        if run.final_event is not None:
            self._finished.keep(run.key, run.final_event, time.monotonic())

    def stop(self, stop: Stop) -> None:
        """Record that an attempt was stopped, because its run request may still arrive."""
        self._stopped.add((stop.task_id, stop.attempt), time.monotonic())

    def forget(self, run: Run) -> None:
        """Remove a run whose code has ended."""
        self.cancelled.pop(run, None)
        self.stuck.discard(run)


class FinishedRuns:
    """The last events of ended runs, kept for ten minutes and up to 32 MiB."""

    def __init__(self) -> None:
        self._kept: OrderedDict[RunKey, tuple[float, bytes]] = OrderedDict()
        self._bytes = 0

    def keep(self, key: RunKey, event: bytes, now: float) -> None:
        """Keep the last event of a run that ended at monotonic time `now`."""
        self._drop(key)
        self._kept[key] = (now, event)
        self._bytes += len(event)
        while self._kept:
            oldest, (at, _) = next(iter(self._kept.items()))
            if now - at <= FINISHED_S and self._bytes <= FINISHED_BYTES:
                return
            self._drop(oldest)

    def get(self, key: RunKey) -> bytes | None:
        """Return the last event of a run, or None if it is not kept."""
        entry = self._kept.get(key)
        return entry[1] if entry else None

    def _drop(self, key: RunKey) -> None:
        entry = self._kept.pop(key, None)
        if entry is not None:
            self._bytes -= len(entry[1])


class StoppedAttempts:
    """The attempts that were stopped in the last minute, up to 10,000."""

    def __init__(self) -> None:
        self._at: OrderedDict[RunKey, float] = OrderedDict()

    def add(self, key: RunKey, now: float) -> None:
        """Record an attempt that was stopped at monotonic time `now`."""
        self._at.pop(key, None)
        self._at[key] = now
        while now - next(iter(self._at.values())) > STOPPED_S or len(self._at) > MAX_STOPPED:
            self._at.popitem(last=False)

    def __contains__(self, key: RunKey) -> bool:
        return key in self._at
