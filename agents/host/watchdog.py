"""A thread that publishes for a host while an agent blocks the event loop, so that the host is not taken for dead."""

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

from msgspec.structs import replace

from loom.agents.host.announcer import Announcer
from loom.agents.host.runs import Run
from loom.agents.host.timings import HostTimings
from loom.bus.bus import Bus
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.schemas.base import encode
from loom.schemas.errors import BusUnavailable, LoomError
from loom.schemas.run import RunEvent
from loom.schemas.task import TaskError

log = get_logger()

WARN_AGAIN_S = 60.0
CONNECT_S = 2.0
GIVE_BACK_S = 1.0
MAX_FRAMES = 12
MAX_LOGGED = 8
HEARTBEAT = encode(RunEvent(seq=0, kind="heartbeat"))
"""It repeats number 0, because the numbers of unsent events are taken."""


class Watchdog:
    """Publishes heartbeats and announcements on a connection of its own while the event loop is blocked.

    Args:
        bus: The host's connection. The thread opens another one to the same server when it needs it.
        active_runs: Returns the active runs; called from the thread.
        announcer: Repeats the host's last announcement; called from the thread.
        timings: Times of the host.
    """

    def __init__(
        self,
        bus: Bus,
        active_runs: Callable[[], list[Run]],
        announcer: Announcer,
        timings: HostTimings,
    ) -> None:
        self._bus = bus
        self._active_runs = active_runs
        self._announcer = announcer
        self._timings = timings
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._turn_at = time.monotonic()
        self._warn_at = 0.0
        """Time of the next warning if the event loop is still blocked."""
        self._stopped = threading.Event()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start the thread that watches the running event loop."""
        self._turn()
        threading.Thread(target=self._watch, name="loom-watchdog", daemon=True).start()

    def stop(self) -> None:
        """Signal the thread to end, without waiting for it."""
        self._stopped.set()
        if self._timer is not None:
            self._timer.cancel()

    def _turn(self) -> None:
        self._turn_at = time.monotonic()
        self._timer = self._loop.call_later(self._timings.watchdog_check_s, self._turn)

    # -- in the thread

    def _watch(self) -> None:
        checked_at, check_s = time.monotonic(), self._timings.watchdog_check_s
        while not self._stopped.wait(check_s):
            now = time.monotonic()
            stalled_s, checked_at = now - checked_at - check_s, now
            if stalled_s > self._timings.blocked_warning_s:
                log.warning("process_stalled", seconds=round(stalled_s, 1), **self._suspect_fields())
            elif now - self._turn_at > self._timings.blocked_s and not self._loop.is_closed():
                try:
                    asyncio.run(self._publish_while_blocked(self._turn_at))
                    self._warn_at = 0.0
                except Exception as error:  # noqa: BLE001 - it would end the thread, and the host would be lost
                    with suppress(OSError, ValueError):  # the log itself may be the cause
                        log.error("watchdog_failed", **error_fields(error))
                checked_at = time.monotonic()

    async def _publish_while_blocked(self, since: float) -> None:
        """Publish heartbeats and announcements until the event loop runs again."""
        heartbeat_at = announce_at = 0.0
        async with AsyncExitStack() as stack:
            bus: Bus | None = None
            while self._turn_at == since and not self._stopped.is_set() and not self._loop.is_closed():
                now = time.monotonic()
                bus = bus or await self._connect(stack)
                if bus is not None and now >= heartbeat_at:
                    heartbeat_at = now + self._timings.heartbeat_s
                    self._publish_heartbeats(bus)
                if bus is not None and now >= announce_at:
                    announce_at = now + self._timings.announce_s
                    self._announce(bus)
                if now - since >= self._timings.blocked_warning_s and now >= self._warn_at:
                    self._warn_at = now + WARN_AGAIN_S  # set first: a failing log is not retried at once
                    self._warn(now - since)
                await asyncio.sleep(min(self._timings.watchdog_check_s, self._timings.heartbeat_s))

    async def _connect(self, stack: AsyncExitStack) -> Bus | None:
        """Open a connection of the thread, or return None if the server does not answer."""
        bus = Bus(
            self._bus.connection.url,
            namespace=self._bus.subjects.namespace,
            role=self._bus.role,
            identity=self._bus.identity,
            patience_s=CONNECT_S,
        )
        try:
            return await stack.enter_async_context(bus)
        except BusUnavailable as error:
            log.warning("watchdog_not_connected", reason=error.message)
            return None

    def _publish_heartbeats(self, bus: Bus) -> None:
        for run in self._active_runs():
            if run.left_s > 0:
                with suppress(LoomError):  # a heartbeat is delivered at most once
                    bus.connection.publish_nowait(run.subject, HEARTBEAT)

    def _announce(self, bus: Bus, *, draining: bool = False) -> None:
        announcement = self._announcer.repeat()
        if announcement is not None:
            with suppress(LoomError):  # an announcement is delivered at most once
                message = replace(announcement, draining=announcement.draining or draining)
                bus.connection.publish_nowait(self._announcer.subject, message)

    def _warn(self, blocked_s: float) -> None:
        frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 - there is no public function
        frames = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=MAX_FRAMES, lookup_lines=False)
        log.warning(
            "event_loop_blocked",
            seconds=round(blocked_s, 1),
            frames=[f"{line.filename}:{line.lineno} {line.name}" for line in frames],
            hint="move blocking work to a sync function, to asyncio.to_thread or to a process",
            **self._suspect_fields(),
        )

    def _suspect_fields(self) -> dict[str, object]:
        """Return log fields with the run that blocks the event loop, or with all runs that may."""
        runs, current = self._active_runs(), asyncio.current_task(self._loop)
        started = [run for run in runs if run.work is not None]
        suspects = [run for run in started if run.work is current] or started
        return {
            "nodes": sorted({run.request.node_id for run in suspects})[:MAX_LOGGED],
            "tasks": [run.request.task_id for run in suspects][:MAX_LOGGED],
        }

    # -- in any other thread

    def give_back(self, reason: TaskError) -> None:
        """Publish that all active runs end with this error, without the event loop, before the process ends."""
        with suppress(TimeoutError):
            asyncio.run(self._give_back(reason))

    async def _give_back(self, reason: TaskError) -> None:
        runs = self._active_runs()
        async with asyncio.timeout(GIVE_BACK_S), AsyncExitStack() as stack:
            bus = await self._connect(stack)
            if bus is None:
                return
            self._announce(bus, draining=True)
            for run in runs:
                with suppress(LoomError):  # the watcher detects the silence
                    bus.connection.publish_nowait(run.subject, encode(RunEvent(seq=0, kind="error", error=reason)))
            await bus.requests.flush(timeout_s=GIVE_BACK_S)
        log.info("runs_given_back", tasks=[run.request.task_id for run in runs][:MAX_LOGGED], count=len(runs))
