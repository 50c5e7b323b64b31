"""A run on a plain node: one request, whose first reply ends the run."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from loom.bus.host_directory import HostKey
from loom.bus.logs.discard_reports import as_reason
from loom.bus.natsio.transport.message import Msg
from loom.phases.execute.run_inbox import count_discarded
from loom.phases.execute.run_stream import LATE_EVENT_S, Hosts, HostSilent, Interrupt, no_waiter
from loom.phases.execute.stops import HostRun
from loom.schemas.base import Undecodable, decode, encode
from loom.schemas.run import MAX_OUTLINE_BYTES, RunEvent, RunRequest, read_events
from loom.schemas.task import Accept, RunResult, TaskError

RUN_S = 60.0
"""Longest run of a plain node that announces no limit of its own."""
KEY_HEADER = "Loom-Key"
ERROR_HEADERS = ("Nats-Service-Error", "Nats-Service-Error-Code")
LAST_KINDS = ("result", "error", "rejected")
"""Event kinds that a reply may have."""
_ANY: Any = Any
SECOND_REPLY = "a second reply: the first one has ended the run"


class PlainRun:
    """Requests a run from a plain node and returns its reply as the last event.

    Args:
        hosts: The connections to node hosts.
        host: The host that the run was awarded to.
        request: The run request.
        interrupt: Ends the wait early.
        max_run_s: Seconds after which a node that has not replied is lost.
    """

    def __init__(
        self, hosts: Hosts, host: HostKey, request: RunRequest, interrupt: Interrupt, *, max_run_s: float = RUN_S
    ) -> None:
        self._hosts = hosts
        self._host = host
        self._request = request
        self._interrupt = interrupt
        self._max_run_s = max_run_s
        self._subject = ""
        self._reply: Msg | None = None
        self._absent = False
        """Whether the server has reported that the host has no subscription."""
        self._given_up = False
        self._wakeup = asyncio.Event()

    async def last_event(self) -> RunEvent | None:
        """Send the request and return the reply as the last event of the run; None after an interrupt.

        Raises:
            HostSilent: The host is not connected, or has not replied in time.
        """
        self._subject = self._hosts.events.open(self._host, self._on_message)
        self._interrupt.wake = self._wakeup.set
        try:
            await self._send_request()
            await self._wait_for_reply()
        except HostSilent:
            self._keep_open(min(LATE_EVENT_S, self._request.remaining_s))
            raise
        finally:
            self._interrupt.wake = no_waiter
            if self._reply is None and self._interrupt.ends_attempt:
                self._keep_open(self._hosts.stops.last_event_wait_s)
            elif not self._given_up:
                self._hosts.events.close(self._subject, expect_more=self._reply is None)
        return None if self._reply is None else self._read_reply(self._reply)

    async def _send_request(self) -> None:
        self._absent = False
        bus, key = self._hosts.bus, self._request.key
        request = decode(encode(replace(self._request, sent_at=bus.clock.now())), dict[str, Any])
        subject = bus.subjects.of("run", self._host.owner, self._host.host_id)
        await bus.connection.publish(subject, {**request, "key": key}, reply=self._subject, headers={KEY_HEADER: key})

    async def _wait_for_reply(self) -> None:
        """Wait for the reply or an interrupt; repeat the request to an absent host each second, for 3 s."""
        timings, started = self._hosts.timings, time.monotonic()
        while self._reply is None and self._interrupt.reason is None:
            waited_s = time.monotonic() - started
            if self._absent:
                if waited_s >= timings.plain_absent_s:
                    raise HostSilent(f"host {self._host} is not connected")
                if not await self._wait(timings.repeat_request_s):
                    await self._send_request()
            elif not await self._wait(self._max_run_s - waited_s):
                raise HostSilent(f"host {self._host} has not replied in {self._max_run_s:g} s")

    async def _wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for a message or an interrupt; return whether one has arrived."""
        try:
            async with asyncio.timeout(seconds):
                await self._wakeup.wait()
        except TimeoutError:
            return False
        self._wakeup.clear()
        return True

    def _on_message(self, msg: Msg) -> None:
        if self._given_up:
            self._on_late_reply(msg)
        elif msg.status == "503":
            self._absent = True
        elif self._reply is None:
            self._reply = msg
        else:
            self._count_discarded(SECOND_REPLY)
        self._wakeup.set()

    def _keep_open(self, keep_s: float) -> None:
        """Give up the run, and keep its subject open for a late reply."""
        self._given_up = True
        asyncio.get_running_loop().call_later(keep_s, self._hosts.events.close, self._subject)

    def _on_late_reply(self, msg: Msg) -> None:
        if msg.status == "503":
            return
        self._hosts.events.close(self._subject, expect_more=False)
        self._hosts.stops.cancel(HostRun(self._host, self._request.task_id, self._request.attempt))
        if not self._interrupt.ends_attempt:
            self._count_discarded("the run was given up before its reply arrived")

    def _read_reply(self, msg: Msg) -> RunEvent:
        if any(name in msg.headers for name in ERROR_HEADERS):
            why = " ".join(msg.headers[name] for name in reversed(ERROR_HEADERS) if name in msg.headers)
            return failure(f"the service answered with an error: {why}")
        return read_reply(msg.data, self._request.accept, self._count_discarded)

    def _count_discarded(self, reason: str) -> None:
        facts = {"task_id": self._request.task_id, "attempt": self._request.attempt}
        count_discarded(self._hosts.bus, self._host, "run_event_left_out", reason, **facts)


def read_reply(raw: bytes, accept: Accept | None, discard: Callable[[str], None]) -> RunEvent:
    """Return a plain node's reply as the last event of its run.

    A JSON object whose `kind` is that of a last event is decoded as one, and needs no number. Any other body is the
    content. A JSON string counts as its text, unless the ad has a JSON Schema, which applies to the whole body.

    Args:
        raw: Body of the reply.
        accept: Acceptance criteria of the ad.
        discard: Called with the reason if a last event cannot be decoded; the run then ends as `agent_failed`.
    """
    try:
        body = decode(raw, _ANY, limit=MAX_OUTLINE_BYTES)
    except Undecodable:
        body = None
    if isinstance(body, dict) and body.get("kind") in LAST_KINDS:
        return read_events(encode({"seq": 0, **body}), discard)[0]
    unwrapped = isinstance(body, str) and (accept is None or accept.json_schema is None)
    content = body if unwrapped else raw.decode(errors="replace")
    return RunEvent(seq=0, kind="result", result=RunResult(content=content, steps=1))


def failure(why: str) -> RunEvent:
    """Return the last event of a failed run."""
    return RunEvent(seq=0, kind="error", error=TaskError(code="agent_failed", message=as_reason(why)))
