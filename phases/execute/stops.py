"""Stop messages to hosts: repeated until the last event of the run has arrived."""

import asyncio
from typing import Literal, NamedTuple

from loom.bus.bus import Bus
from loom.bus.host_directory import HostKey
from loom.bus.logs.logger import get_logger
from loom.phases.execute.timings import ExecuteTimings
from loom.schemas.errors import LoomError
from loom.schemas.run import Stop

log = get_logger()

STOPS = 5
"""Stop messages per run, at most."""

StopReason = Literal["cancelled", "silent", "late", "flooded", "forged", "superseded", "ended"]


class HostRun(NamedTuple):
    """An attempt and the host that runs it."""

    host: HostKey
    task_id: str
    attempt: int


class Stops:
    """Publishes `loom.stop` for runs whose result is not needed any more: once a second, at most five times.

    Args:
        bus: A connected bus.
        repeat_stop_s: Seconds between the stop messages of a run.
    """

    def __init__(self, bus: Bus, repeat_stop_s: float = ExecuteTimings.repeat_stop_s) -> None:
        self._bus = bus
        self._repeat_stop_s = repeat_stop_s
        self.last_event_wait_s = STOPS * repeat_stop_s + 1
        """Seconds for which the last event of a stopped run is awaited."""
        self._repeating: dict[HostRun, asyncio.Task[None]] = {}

    def start(self, run: HostRun, why: StopReason) -> None:
        """Publish the first stop of a run and repeat it each second. A run that is being stopped is left unchanged."""
        if run in self._repeating or not run.host.host_id:
            return
        log.info("run_stopped", task_id=run.task_id, attempt=run.attempt, host_id=str(run.host), why=why)
        self._publish(run, why)
        repeating = self._bus.tasks.spawn(self._repeat(run, why), name=f"stop {run.task_id}")
        self._repeating[run] = repeating
        repeating.add_done_callback(lambda _: self._repeating.pop(run, None))

    def cancel(self, run: HostRun) -> None:
        """Publish no more stops of a run: its last event has arrived."""
        repeating = self._repeating.get(run)
        if repeating is not None:
            repeating.cancel()

    async def _repeat(self, run: HostRun, why: StopReason) -> None:
        for _ in range(STOPS - 1):
            await asyncio.sleep(self._repeat_stop_s)
            self._publish(run, why)

    def _publish(self, run: HostRun, why: StopReason) -> None:
        try:
            subject = self._bus.subjects.of("stop", run.host.owner, run.host.host_id)
            self._bus.connection.publish_nowait(subject, Stop(task_id=run.task_id, attempt=run.attempt, why=why))
        except LoomError as error:
            log.warning("stop_not_sent", task_id=run.task_id, attempt=run.attempt, reason=error.message)
