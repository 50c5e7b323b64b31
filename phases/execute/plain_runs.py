"""A run on a plain node: one request, and its first reply is the end of the run."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from loom.bus.host_directory import HostKey
from loom.bus.logs.left_out import as_reason
from loom.bus.natsio.transport.message import Msg
from loom.phases.execute.run_inbox import count_discarded
from loom.phases.execute.run_stream import LATE_S, STOPPED_S, Hosts, HostSilent, Interrupt, nobody_waits
from loom.phases.execute.stops import HostRun
from loom.schemas.base import Undecodable, decode, encode
from loom.schemas.run import MAX_OUTLINE_BYTES, RunEvent, RunRequest, read_events
from loom.schemas.task import Accept, RunResult, TaskError

RUN_S = 60.0
"""Longest run of a plain node that announces none."""
ABSENT_S = 3.0
"""For so long a node is asked again that the server does not know."""
ASK_AGAIN_S = 1.0
KEY_HEADER = "Loom-Key"
ERROR_HEADERS = ("Nats-Service-Error", "Nats-Service-Error-Code")
LAST_KINDS = ("result", "error", "rejected")
"""Kinds of a reply that is an event."""
_ANY: Any = Any
SECOND_REPLY = "a second reply: the first one is the end of the run"


class PlainRun:
    """A run on a plain node, as EXECUTE follows it.

    Args:
        max_run_s: Seconds after which a node that has not replied is lost.
        interrupt: Ends the wait early.
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
        """Whether the server has answered that there is no such host."""
        self._given_up = False
        self._woken = asyncio.Event()

    async def last_event(self) -> RunEvent | None:
        """Ask the node and return its reply as the last event of the run; None when the watching is interrupted.

        Raises:
            Silent: There is no such host, or it has not replied in time.
        """
        self._subject = self._hosts.events.open(self._host, self._take)
        self._interrupt.wake = self._woken.set
        try:
            await self._ask()
            await self._answered()
        except HostSilent:
            self._give_up(min(LATE_S, self._request.remaining_s))
            raise
        finally:
            self._interrupt.wake = nobody_waits
            if self._reply is None and self._interrupt.ends_attempt:
                self._give_up(STOPPED_S)
            elif not self._given_up:
                self._hosts.events.close(self._subject, expect_more=self._reply is None)
        return None if self._reply is None else self._read(self._reply)

    async def _ask(self) -> None:
        self._absent = False
        bus, key = self._hosts.bus, self._request.key
        request = decode(encode(replace(self._request, sent_at=bus.clock.now())), dict[str, Any])
        subject = bus.subjects.of("run", self._host.owner, self._host.host_id)
        await bus.connection.publish(subject, {**request, "key": key}, reply=self._subject, headers={KEY_HEADER: key})

    async def _answered(self) -> None:
        """Wait for the reply or an interrupt; a host that is absent is asked again each second, for 3 s."""
        started = time.monotonic()
        while self._reply is None and self._interrupt.reason is None:
            waited_s = time.monotonic() - started
            if self._absent:
                if waited_s >= ABSENT_S:
                    raise HostSilent(f"host {self._host} is not there")
                if not await self._woken_within(ASK_AGAIN_S):
                    await self._ask()
            elif not await self._woken_within(self._max_run_s - waited_s):
                raise HostSilent(f"host {self._host} has not replied in {self._max_run_s:g} s")

    async def _woken_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            return False
        self._woken.clear()
        return True

    def _take(self, msg: Msg) -> None:
        if self._given_up:
            self._end_late(msg)
        elif msg.status == "503":
            self._absent = True
        elif self._reply is None:
            self._reply = msg
        else:
            self._count(SECOND_REPLY)
        self._woken.set()

    def _give_up(self, keep_s: float) -> None:
        """Keep the subject open for a reply that comes too late."""
        self._given_up = True
        asyncio.get_running_loop().call_later(keep_s, self._hosts.events.close, self._subject)

    def _end_late(self, msg: Msg) -> None:
        if msg.status == "503":
            return
        self._hosts.events.close(self._subject, expect_more=False)
        self._hosts.stops.ended(HostRun(self._host, self._request.task_id, self._request.attempt))
        if not self._interrupt.ends_attempt:
            self._count("the run was given up before its reply came")

    def _read(self, msg: Msg) -> RunEvent:
        if any(name in msg.headers for name in ERROR_HEADERS):
            why = " ".join(msg.headers[name] for name in reversed(ERROR_HEADERS) if name in msg.headers)
            return failed(f"the service answered with an error: {why}")
        return read_reply(msg.data, self._request.accept, self._count)

    def _count(self, reason: str) -> None:
        facts = {"task_id": self._request.task_id, "attempt": self._request.attempt}
        count_discarded(self._hosts.bus, self._host, "run_event_left_out", reason, **facts)


def read_reply(raw: bytes, accept: Accept | None, discard: Callable[[str], None]) -> RunEvent:
    """Return a plain node's reply as the last event of its run.

    A JSON object whose `kind` is that of a last event is read as one, and needs no number; any other body is the
    content. A JSON string counts as its text, unless the ad has a JSON Schema, which is for the body as it is.

    Args:
        discard: Called with the reason for a last event that cannot be read; it ends the run as `agent_failed`.
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


def failed(why: str) -> RunEvent:
    """Return the last event of a run that has failed."""
    return RunEvent(seq=0, kind="error", error=TaskError(code="agent_failed", message=as_reason(why)))
