"""Checks of acceptance criteria in helper processes, which protect the event loop and its memory from submitters."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Generic, Literal, TypeVar

import msgspec

from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.phases.shared.acceptance import encoded_schema, has_check, out_of_bounds, plain_violation
from loom.phases.shared.check_process import HelperDied, HelperProcess
from loom.phases.shared.timings import CheckTimings
from loom.schemas.base import Message, encode
from loom.schemas.errors import Overloaded
from loom.schemas.task import Accept, TaskError

log = get_logger()
T = TypeVar("T")

QUICK_S: Final = 0.1
"""CPU seconds of a check in the quick lane; a check that needs more moves to the slow lane."""
SLOW_S: Final = 1.0
"""CPU seconds of a check in the slow lane; a check that needs more has failed."""
MAX_SLOW: Final = 8
"""Limit of checks in the slow lane, including the running one."""
MAX_REMEMBERED: Final = 1024
"""Limit of cached outcomes."""


class NotChecked(Overloaded):
    """The check cannot be made now: too many checks wait, or no helper process starts."""


@dataclass(frozen=True)
class Violation:
    """The reason why a result is refused.

    Args:
        decided: False: the check reached a limit, so that the result may be valid.
    """

    error: TaskError
    decided: bool = True


class _Reply(Message, frozen=True, kw_only=True):
    kind: Literal["met", "unmet", "unusable", "slow", "memory", "died"]
    fault: str = ""
    last: bool = False


_decode_reply = msgspec.json.Decoder(_Reply).decode


class CheckPool:
    """Checks acceptance criteria for one service, in at most two processes that start with their first check.

    Every check starts in the quick lane, where it can delay others by a tenth of a second. Costly checks wait for each
    other in the slow lane. The processes end with the bus.

    Args:
        bus: A connected bus.
        timings: Limits of waits and of helper processes.
    """

    def __init__(self, bus: Bus, timings: CheckTimings = CheckTimings()) -> None:
        self._quick = _Lane(bus, QUICK_S, timings, limit=None)
        self._slow = _Lane(bus, SLOW_S, timings, limit=MAX_SLOW)
        self._outcomes: _LRU[str | None] = _LRU()
        """Digest of pattern and schema -> why they are unusable; None: they are usable."""
        self._slow_digests: _LRU[bool] = _LRU()
        """Digests of criteria that were too costly for the quick lane."""

    async def unsatisfiable(self, accept: Accept) -> str | None:
        """Return why a pattern or a JSON Schema is unusable, in one sentence; None if both are usable.

        Raises:
            NotChecked: The check cannot be made now.
        """
        if not has_check(accept):
            return None
        schema = encoded_schema(accept)
        if isinstance(schema, str):
            return schema
        digest = _digest(accept, schema)
        if digest not in self._outcomes:
            fault = out_of_bounds(accept)
            reply = _Reply(kind="unusable", fault=fault) if fault else await self._ask(accept, schema, digest, None)
            if reply.kind == "died":  # the next check may succeed
                return _fault_of(reply, accept)
            self._outcomes[digest] = _fault_of(reply, accept)
        return self._outcomes[digest]

    async def violation(self, content: str, accept: Accept) -> Violation | None:
        """Return why a result violates pattern or JSON Schema; None if it does not, or if `plain_violation` refuses it.

        Raises:
            NotChecked: The check cannot be made now.
        """
        if not has_check(accept) or plain_violation(content, accept) is not None:
            return None
        schema = encoded_schema(accept)
        if isinstance(schema, str):
            return _unusable(schema)
        digest = _digest(accept, schema)
        if digest not in self._outcomes and (fault := out_of_bounds(accept)) is not None:
            self._outcomes[digest] = fault
        if (fault := self._outcomes.get(digest)) is not None:
            return _unusable(fault)
        reply = await self._ask(accept, schema, digest, content)
        if reply.kind in {"met", "unmet", "unusable"}:
            self._outcomes[digest] = reply.fault if reply.kind == "unusable" else None
        fault = _fault_of(reply, accept)
        if fault is None:
            return None
        if reply.kind == "unusable":
            return _unusable(fault)
        return Violation(TaskError(code="rejected_result", message=fault[:2000]), decided=reply.kind == "unmet")

    async def _ask(self, accept: Accept, schema: bytes, digest: bytes, content: str | None) -> _Reply:
        request = {"pattern": accept.pattern, "json_schema": msgspec.Raw(schema), "content": content}
        if digest not in self._slow_digests:
            reply = await self._quick.ask(request)
            if reply.kind not in {"slow", "memory", "died"}:
                return reply
            if reply.kind != "died":  # otherwise another process may have killed the helper
                self._slow_digests[digest] = True
        return await self._slow.ask(request)


class _Lane:
    """One helper process, which runs one check after another in order of arrival.

    Args:
        cpu_s: CPU seconds for each check.
        timings: Limits of waits and of the helper process.
        limit: Limit of waiting and running checks; None: only the waiting time is limited.
    """

    def __init__(self, bus: Bus, cpu_s: float, timings: CheckTimings, limit: int | None) -> None:
        self._bus = bus
        self._timings = timings
        self._cpu_s = cpu_s
        self._limit = limit
        self._lock = asyncio.Lock()
        self._pending = 0
        self._helper: HelperProcess | None = None
        self._not_before = 0.0
        """Monotonic time from which a helper may be started again."""

    async def ask(self, request: Mapping[str, object]) -> _Reply:
        """Return the outcome of a check; kind "died" if the process ended for an unknown reason.

        Raises:
            NotChecked: The waiting time passed, no process starts, or the process is stuck.
        """
        raw = encode({"cpu_s": self._cpu_s, **request})
        async with self._acquired():
            helper = self._helper
            if helper is None or not helper.is_alive:
                helper = await self._start()
            try:
                reply = _decode_reply(await helper.ask(raw, self._timings.stuck_s))
            except HelperDied as died:
                self._end_helper("cpu" if died.why == "cpu" else "memory, or a signal")
                return _Reply(kind="slow" if died.why == "cpu" else "died")
            except TimeoutError:
                self._end_helper("stuck")
                why = "the helper process that checks accept is stuck"
                raise NotChecked(why, retry_after_s=self._timings.restart_s) from None
            except BaseException:  # a cancellation: its answer would be read as that of the next check
                self._end_helper("cancelled")
                raise
            if reply.last:
                self._end_helper("")
            return reply

    @asynccontextmanager
    async def _acquired(self) -> AsyncIterator[None]:
        wait_s = self._timings.wait_s
        if self._limit is not None and self._pending >= self._limit:
            raise NotChecked("too many costly checks of accept are waiting; try again later", retry_after_s=wait_s)
        self._pending += 1
        try:
            try:
                async with asyncio.timeout(wait_s):
                    await self._lock.acquire()
            except TimeoutError:
                why = f"the check of accept waited for {wait_s:g} s; try again later"
                raise NotChecked(why, retry_after_s=wait_s) from None
            try:
                yield
            finally:
                self._lock.release()
        finally:
            self._pending -= 1

    async def _start(self) -> HelperProcess:
        self._end_helper("")
        if time.monotonic() < self._not_before:
            raise NotChecked("no helper process can be started to check accept", retry_after_s=self._timings.restart_s)
        self._not_before = time.monotonic() + self._timings.restart_s
        try:
            helper = await HelperProcess.start()
        except (OSError, HelperDied) as error:  # TimeoutError is an OSError
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            log.error("json_schema_check_not_started", reason=reason)
            why = f"no helper process can be started to check accept ({reason})"
            raise NotChecked(why, retry_after_s=self._timings.restart_s) from None
        self._not_before = 0.0
        self._helper = helper
        self._bus.tasks.spawn(_end_with_bus(helper), name="check helper")
        return helper

    def _end_helper(self, why: str) -> None:
        """End the helper process, if any; the next check starts another one."""
        helper, self._helper = self._helper, None
        if helper is not None:
            helper.close()
            if why:
                log.warning("json_schema_check_ended", why=why)


async def _end_with_bus(helper: HelperProcess) -> None:
    """Close the helper when this task is cancelled, which happens when the bus closes."""
    try:
        await helper.closed.wait()
    except asyncio.CancelledError:
        await asyncio.sleep(0)  # running checks are cancelled in the same turn and release the socket
        helper.close()
        raise


class _LRU(OrderedDict[bytes, T], Generic[T]):
    """A mapping of the latest entries, without the oldest ones."""

    def __setitem__(self, key: bytes, value: T) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > MAX_REMEMBERED:
            self.popitem(last=False)


def _digest(accept: Accept, schema: bytes) -> bytes:
    return blake2b(encode(accept.pattern) + schema, digest_size=16).digest()


def _unusable(fault: str) -> Violation:
    return Violation(TaskError(code="invalid_task", message=fault[:2000], field="accept"))


def _fault_of(reply: _Reply, accept: Accept) -> str | None:
    if reply.kind in {"met", "unmet", "unusable"}:
        return reply.fault or None
    part = "accept.pattern" if accept.json_schema is None else "accept.json_schema"
    if accept.pattern is not None and accept.json_schema is not None:
        part = "accept.pattern and accept.json_schema"
    if reply.kind == "died":
        return f"{part} could not be checked: the helper process ended, perhaps for lack of memory"
    limit = f"{SLOW_S:g} s of CPU time" if reply.kind == "slow" else "512 MiB of memory"
    return f"{part} could not be checked within {limit}"
