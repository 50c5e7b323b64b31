"""A thread that watches a host's event loop: an agent that blocks the loop must not look like a dead host."""

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
from loom.bus.bus import Bus
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.schemas.base import encode
from loom.schemas.errors import BusUnavailable, LoomError
from loom.schemas.run import RunEvent
from loom.schemas.task import TaskError

log = get_logger()

CHECK_S = 0.5
BLOCKED_S = 1.0
"""Time without a turn after which the loop counts as blocked."""
WARN_S = 5.0
WARN_AGAIN_S = 60.0
CONNECT_S = 2.0
GIVE_BACK_S = 1.0
MOST_FRAMES = 12
MOST_NAMED = 8
HEARTBEAT = encode(RunEvent(seq=0, kind="heartbeat"))
"""It repeats a number that is past already: events not sent yet keep their own."""


class Watchdog:
    """Publishes heartbeats and announcements on a connection of its own while the event loop is blocked.

    Args:
        bus: The host's connection; another one to the same server is opened when it is needed.
        runs: Returns the runs in hand; called from the thread.
        announcer: Has the host's last announcement, to be published again; asked from the thread.
        beat_s: Seconds between heartbeats.
        announce_s: Seconds between announcements.
    """

    def __init__(
        self,
        bus: Bus,
        runs: Callable[[], list[Run]],
        announcer: Announcer,
        *,
        beat_s: float,
        announce_s: float,
    ) -> None:
        self._bus = bus
        self._runs = runs
        self._announcer = announcer
        self._beat_s, self._announce_s = beat_s, announce_s
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._turn_at = time.monotonic()
        self._warn_at = 0.0
        """When to warn again of a loop that is still blocked."""
        self._stopped = threading.Event()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to watch the running event loop."""
        self._turn()
        threading.Thread(target=self._watch, name="loom-watchdog", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer; returns at once."""
        self._stopped.set()
        if self._timer is not None:
            self._timer.cancel()

    def _turn(self) -> None:
        self._turn_at = time.monotonic()
        self._timer = self._loop.call_later(CHECK_S, self._turn)

    # -- in the thread

    def _watch(self) -> None:
        checked_at = time.monotonic()
        while not self._stopped.wait(CHECK_S):
            now = time.monotonic()
            stalled_s, checked_at = now - checked_at - CHECK_S, now
            if stalled_s > WARN_S:
                log.warning("process_stalled", seconds=round(stalled_s, 1), **self._work_in_hand())
            elif now - self._turn_at > BLOCKED_S and not self._loop.is_closed():
                try:
                    asyncio.run(self._stand_in(self._turn_at))
                    self._warn_at = 0.0
                except Exception as error:  # noqa: BLE001 - an escaping one would end the thread, and the host with it
                    with suppress(OSError, ValueError):  # it may be the log itself that fails
                        log.error("watchdog_failed", **error_fields(error))
                checked_at = time.monotonic()

    async def _stand_in(self, since: float) -> None:
        """Publish in the place of the loop until it turns again."""
        beat_at = announce_at = 0.0
        async with AsyncExitStack() as stack:
            bus: Bus | None = None
            while self._turn_at == since and not self._stopped.is_set() and not self._loop.is_closed():
                now = time.monotonic()
                bus = bus or await self._connected(stack)
                if bus is not None and now >= beat_at:
                    beat_at = now + self._beat_s
                    self._beat(bus)
                if bus is not None and now >= announce_at:
                    announce_at = now + self._announce_s
                    self._announce(bus)
                if now - since >= WARN_S and now >= self._warn_at:
                    self._warn_at = now + WARN_AGAIN_S  # first: a log that fails must not do so each time
                    self._warn(now - since)
                await asyncio.sleep(min(CHECK_S, self._beat_s))

    async def _connected(self, stack: AsyncExitStack) -> Bus | None:
        twin = Bus(
            self._bus.connection.url,
            namespace=self._bus.subjects.namespace,
            role=self._bus.role,
            identity=self._bus.identity,
            patience_s=CONNECT_S,
        )
        try:
            return await stack.enter_async_context(twin)
        except BusUnavailable as error:
            log.warning("watchdog_not_connected", reason=error.message)
            return None

    def _beat(self, bus: Bus) -> None:
        for run in self._runs():
            if run.left_s > 0:
                with suppress(LoomError):  # at most once, as every heartbeat
                    bus.connection.publish_nowait(run.subject, HEARTBEAT)

    def _announce(self, bus: Bus, *, draining: bool = False) -> None:
        announcement = self._announcer.repeated()
        if announcement is not None:
            with suppress(LoomError):  # at most once, as every announcement
                message = replace(announcement, draining=announcement.draining or draining)
                bus.connection.publish_nowait(self._announcer.subject, message)

    def _warn(self, blocked_s: float) -> None:
        frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 - Python's only way to it
        frames = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=MOST_FRAMES, lookup_lines=False)
        log.warning(
            "event_loop_blocked",
            seconds=round(blocked_s, 1),
            frames=[f"{each.filename}:{each.lineno} {each.name}" for each in frames],
            hint="blocking work belongs in a def, in asyncio.to_thread or in a process",
            **self._work_in_hand(),
        )

    def _work_in_hand(self) -> dict[str, object]:
        """The run that has the loop, or those that may have it."""
        runs, current = self._runs(), asyncio.current_task(self._loop)
        begun = [run for run in runs if run.work is not None]
        suspects = [run for run in begun if run.work is current] or begun
        return {
            "nodes": sorted({run.request.node_id for run in suspects})[:MOST_NAMED],
            "tasks": [run.request.task_id for run in suspects][:MOST_NAMED],
        }

    # -- in any other thread

    def give_back(self, why: TaskError) -> None:
        """Publish that the runs in hand end for this reason, without the loop; for a process that is about to end."""
        with suppress(TimeoutError):
            asyncio.run(self._give_back(why))

    async def _give_back(self, why: TaskError) -> None:
        runs = self._runs()
        async with asyncio.timeout(GIVE_BACK_S), AsyncExitStack() as stack:
            bus = await self._connected(stack)
            if bus is None:
                return
            self._announce(bus, draining=True)
            for run in runs:
                with suppress(LoomError):  # its watcher finds out by its silence
                    bus.connection.publish_nowait(run.subject, encode(RunEvent(seq=0, kind="error", error=why)))
            await bus.requests.flush(timeout_s=GIVE_BACK_S)
        log.info("runs_given_back", tasks=[run.request.task_id for run in runs][:MOST_NAMED], count=len(runs))
