"""A host whose event loop is blocked by an agent."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import pytest
from support.logs import capture_logs
from support.nodes import node
from support.runs import event_subject
from support.wait import until

from loom.agents.host.node_host import NodeHost
from loom.agents.host.timings import HostTimings
from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.schemas.auction import HostAnnouncement
from loom.schemas.base import decode
from loom.schemas.run import RunEvent, RunRequest, read_events

WITHIN_S = 20
TIMINGS = HostTimings(announce_s=0.1, heartbeat_s=0.1, watchdog_check_s=0.05, blocked_s=0.2, blocked_warning_s=0.4)


class HostInAThread:
    """A node host on an event loop of its own, so that a test can watch it while the loop is blocked."""

    def __init__(self, url: str, namespace: str, agent: Callable[..., Any]) -> None:
        self._url, self._namespace, self._agent = url, namespace, agent
        self._end: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self.host: NodeHost
        self.started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self) -> None:
        self._end, self._loop = asyncio.Event(), asyncio.get_running_loop()
        async with Bus(self._url, namespace=self._namespace, role="node") as bus:
            self.host = NodeHost(bus, lambda: [node("n1", self._agent)], timings=TIMINGS)
            await self.host.start()
            self.started.set()
            await self._end.wait()
            await self.host.drain(0)

    async def __aenter__(self) -> Self:
        self._thread.start()
        assert await asyncio.to_thread(self.started.wait, WITHIN_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        await asyncio.to_thread(self._thread.join, WITHIN_S)
        assert not self._thread.is_alive()


@pytest.fixture
async def bus(nats_url: str, namespace: str) -> AsyncIterator[Bus]:
    async with Bus(nats_url, namespace=namespace) as bus:
        yield bus


async def events_of(bus: Bus, host: NodeHost, **facts: Any) -> list[RunEvent]:
    events: list[RunEvent] = []

    def take(msg: Msg) -> None:
        events.extend(read_events(msg.data))

    request = RunRequest(**{"task_id": "t1", "node_id": "n1", "description": "it", **facts})
    reply = await event_subject(bus, host.host_id, take)
    await bus.connection.publish(bus.subjects.of("run", "local", host.host_id), request, reply=reply)
    return events


class Blocks:
    """An async agent that blocks its event loop until the test lets it go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.begun = 0

    async def __call__(self, job: RunRequest) -> str:
        self.begun += 1
        secret_value = "sk-canary-0123456789"  # a value that no stack in a log may show
        self.go_on.wait(WITHIN_S)
        return f"did {job.description} with {len(secret_value)} characters"


@pytest.mark.slow
async def test_a_blocked_host_stays_alive_for_its_watchers(bus: Bus, nats_url: str, namespace: str) -> None:
    agent = Blocks()
    received: list[HostAnnouncement] = []
    await bus.connection.subscribe_sync(
        bus.subjects.of("host", "*", "*"), lambda msg: received.append(decode(msg.data, HostAnnouncement))
    )
    async with HostInAThread(nats_url, namespace, agent) as thread:
        with capture_logs() as logs:
            events = await events_of(bus, thread.host)
            await until(lambda: agent.begun, what="the agent blocks the loop")
            before = len(received)
            beats = sum(event.kind == "heartbeat" for event in events)
            await until(
                lambda: sum(event.kind == "heartbeat" for event in events) >= beats + 5,
                within_s=WITHIN_S,
                what="heartbeats while the loop is blocked",
            )
            await until(lambda: len(received) >= before + 3, within_s=WITHIN_S, what="announcements, too")
            await until(
                lambda: any(line["event"] == "event_loop_blocked" for line in logs),
                within_s=WITHIN_S,
                what="a warning",
            )
            agent.go_on.set()
            await until(lambda: events[-1].kind == "result", within_s=WITHIN_S, what="the result")
        line = next(line for line in logs if line["event"] == "event_loop_blocked")
    assert agent.begun == 1
    assert (line["nodes"], line["tasks"], line["log_level"]) == (["n1"], ["t1"], "warning")
    assert any("test_watchdog.py" in frame and frame.endswith("__call__") for frame in line["frames"])
    assert "canary" not in repr(line)
    assert "asyncio.to_thread" in line["hint"]
    numbers = [event.seq for event in events if event.kind != "heartbeat"]
    assert numbers == sorted(numbers)  # no heartbeat took the number of an event that was not sent yet


@pytest.mark.slow
async def test_a_run_past_its_deadline_gets_no_more_heartbeats_from_the_watchdog(
    bus: Bus, nats_url: str, namespace: str
) -> None:
    agent = Blocks()
    received: list[Msg] = []
    await bus.connection.subscribe_sync(bus.subjects.of("host", "*", "*"), received.append)
    async with HostInAThread(nats_url, namespace, agent) as thread:
        events = await events_of(bus, thread.host, remaining_s=1.0)
        await until(lambda: agent.begun, what="the agent blocks the loop")
        run = thread.host._runs.active()[0]
        await until(lambda: run.left_s == 0, within_s=WITHIN_S, what="the deadline")
        counts: list[int] = []
        for announcements in (2, 4):  # the same thread publishes them
            wanted = len(received) + announcements
            await until(lambda wanted=wanted: len(received) >= wanted, within_s=WITHIN_S, what="it goes on")  # type: ignore[misc]
            counts.append(len(events))
        assert counts[0] == counts[1] > 0
        agent.go_on.set()
        await until(lambda: events[-1].kind == "error", within_s=WITHIN_S, what="the end")


async def test_the_runs_of_a_blocked_host_can_be_given_back_from_another_thread(
    bus: Bus, nats_url: str, namespace: str
) -> None:
    agent = Blocks()
    received: list[HostAnnouncement] = []
    await bus.connection.subscribe_sync(
        bus.subjects.of("host", "*", "*"), lambda msg: received.append(decode(msg.data, HostAnnouncement))
    )
    async with HostInAThread(nats_url, namespace, agent) as thread:
        events = await events_of(bus, thread.host)
        await until(lambda: agent.begun, what="the agent blocks the loop")
        await asyncio.to_thread(thread.host.give_back)
        await until(lambda: events[-1].kind == "error", within_s=WITHIN_S, what="the run is given back")
        assert events[-1].error is not None
        assert events[-1].error.code == "node_busy"
        assert any(each.draining for each in received)
        agent.go_on.set()


@pytest.mark.slow
async def test_a_host_that_is_not_blocked_opens_no_second_connection(bus: Bus, nats_url: str, namespace: str) -> None:
    async def waits(job: RunRequest) -> str:
        await asyncio.sleep(0.6)
        return "done"

    with capture_logs() as logs:
        async with HostInAThread(nats_url, namespace, waits) as thread:
            events = await events_of(bus, thread.host)
            begun = time.monotonic()
            await until(lambda: bool(events) and events[-1].kind == "result", within_s=WITHIN_S, what="the result")
            assert time.monotonic() - begun >= 0.5
    assert not [line for line in logs if line["event"] in ("event_loop_blocked", "watchdog_failed")]
