"""Helper processes: limits, replacement, order, and their end."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.bombs import COSTLY_CONTENT, COSTLY_PATTERNS
from support.bus_helpers import Connect
from support.logs import capture_logs
from support.wait import until

from loom.bus.bus import Bus
from loom.phases.shared import check_pool
from loom.phases.shared.check_pool import CheckPool, NotChecked
from loom.phases.shared.check_process import HelperDied, HelperProcess
from loom.phases.shared.timings import CheckTimings
from loom.schemas.base import encode
from loom.schemas.task import Accept

DIGITS = Accept(pattern=r"^\d+$", json_schema={"type": "integer"})
SLOW = Accept(pattern=COSTLY_PATTERNS[0])


@pytest.fixture
def pool(plain: Bus) -> CheckPool:
    return CheckPool(plain)


def pid_of(lane: check_pool._Lane) -> int:
    assert lane._helper is not None
    return lane._helper._process.pid


def runs(pid: int) -> bool:
    """Whether the process exists, and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def environment(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def request(pattern: str, content: str | None = None, cpu_s: float = 1.0) -> bytes:
    return encode({"cpu_s": cpu_s, "pattern": pattern, "json_schema": None, "content": content})


async def test_a_check_that_needs_no_helper_starts_none(pool: CheckPool) -> None:
    assert await pool.unsatisfiable(Accept(contains=("a",), rubric="short")) is None
    assert await pool.violation("a", Accept(contains=("a",))) is None
    assert await pool.violation("", DIGITS) is None  # the plain rules refuse it
    assert await pool.unsatisfiable(Accept(pattern="a{1001}")) is not None
    assert pool._quick._helper is pool._slow._helper is None


async def test_a_schema_known_to_be_usable_is_not_checked_again(pool: CheckPool) -> None:
    assert await pool.unsatisfiable(DIGITS) is None
    os.kill(pid_of(pool._quick), signal.SIGKILL)
    assert await pool.unsatisfiable(DIGITS) is None
    assert await pool.unsatisfiable(Accept(pattern="(")) == await pool.unsatisfiable(Accept(pattern="(")) is not None


async def test_ordinary_checks_share_one_helper(pool: CheckPool) -> None:
    outcomes = await asyncio.gather(*(pool.violation(text, DIGITS) for text in ["1", "one"] * 50))
    assert [outcome is None for outcome in outcomes] == [True, False] * 50
    assert pool._slow._helper is None


@pytest.mark.slow
async def test_a_check_beyond_its_time_fails_and_those_after_it_are_made(pool: CheckPool) -> None:
    began = time.monotonic()
    outcome = await pool.violation(COSTLY_CONTENT, SLOW)
    assert outcome is not None
    assert not outcome.decided
    assert outcome.error.code == "rejected_result"
    assert outcome.error.message == "accept.pattern could not be checked within 1 s of CPU time"
    assert await pool.violation("1", DIGITS) is None
    assert time.monotonic() - began < 20


@pytest.mark.slow
async def test_costly_checks_wait_for_each_other_and_not_the_others_for_them(pool: CheckPool) -> None:
    bombs = [
        asyncio.ensure_future(pool.violation(COSTLY_CONTENT, Accept(pattern=rf"(a|a|aa)+{n}"))) for n in range(1, 6)
    ]
    await asyncio.sleep(0)
    assert await pool.violation("1", DIGITS) is None
    assert sum(bomb.done() for bomb in bombs) <= 1
    for bomb in bombs:
        bomb.cancel()
    await asyncio.gather(*bombs, return_exceptions=True)
    assert await pool.violation("1", DIGITS) is None


@pytest.mark.slow
async def test_a_known_costly_check_goes_to_the_slow_lane_at_once(pool: CheckPool) -> None:
    await pool.violation(COSTLY_CONTENT, SLOW)
    quick, turns = pid_of(pool._quick), pool._quick._lock
    async with turns:  # nothing passes the quick lane now
        assert await pool.violation("aaa", SLOW) is None
    assert pid_of(pool._quick) == quick


@pytest.mark.slow
async def test_too_many_costly_checks_are_put_off(pool: CheckPool) -> None:
    await pool.violation(COSTLY_CONTENT, SLOW)
    async with pool._slow._lock:
        waiting = [asyncio.ensure_future(pool.violation("a", SLOW)) for _ in range(check_pool.MAX_SLOW)]
        await until(lambda: pool._slow._pending == check_pool.MAX_SLOW, what="the lane is full")
        with pytest.raises(NotChecked, match="too many costly checks"):
            await pool.violation("a", SLOW)
    assert await asyncio.gather(*waiting) == [None] * check_pool.MAX_SLOW


async def test_a_check_waits_a_bounded_time_for_its_turn(plain: Bus) -> None:
    pool = CheckPool(plain, CheckTimings(wait_s=0.05))
    async with pool._quick._lock:
        with pytest.raises(NotChecked, match="accept waited"):
            await pool.violation("1", DIGITS)
    assert await pool.violation("1", DIGITS) is None


async def test_a_helper_that_is_killed_costs_its_own_check_alone(pool: CheckPool) -> None:
    await pool.violation("a", SLOW)
    bomb = asyncio.ensure_future(pool.violation(COSTLY_CONTENT, SLOW))
    await until(lambda: pool._slow._helper is not None, what="the bomb is in the slow lane")
    os.kill(pid_of(pool._slow), signal.SIGKILL)
    outcome = await bomb
    assert outcome is not None
    assert not outcome.decided
    assert "memory" in outcome.error.message
    assert await pool.violation("aaa", SLOW) is None


async def test_a_helper_killed_between_two_checks_is_replaced(pool: CheckPool) -> None:
    assert await pool.violation("1", DIGITS) is None
    pid = pid_of(pool._quick)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not runs(pid), what="the helper is dead")
    assert await pool.violation("2", DIGITS) is None
    assert pid_of(pool._quick) != pid
    with pytest.raises(ProcessLookupError):  # a zombie would still be found
        os.kill(pid, 0)


async def test_a_cancelled_check_leaves_no_answer_for_the_next_one(pool: CheckPool) -> None:
    await pool.violation("a", SLOW)
    check = asyncio.ensure_future(pool.violation(COSTLY_CONTENT, SLOW))
    await until(lambda: pool._quick._pending, what="the check is made")
    await asyncio.sleep(0)
    check.cancel()
    await asyncio.gather(check, return_exceptions=True)
    assert await pool.violation("1", DIGITS) is None
    refused = await pool.violation("one", DIGITS)
    assert refused is not None
    assert "does not match" in refused.error.message


async def test_a_stuck_helper_is_replaced(plain: Bus) -> None:
    pool = CheckPool(plain, CheckTimings(stuck_s=1.0))
    assert await pool.violation("1", DIGITS) is None
    os.kill(pid_of(pool._quick), signal.SIGSTOP)
    with pytest.raises(NotChecked, match="stuck"):
        await pool.violation("1", DIGITS)
    assert await pool.violation("1", DIGITS) is None


async def test_helpers_that_cannot_be_started_are_named_and_tried_again(
    pool: CheckPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(sys, "executable", "/nowhere/python")
        for _ in range(3):
            with pytest.raises(NotChecked, match="no helper process can be started"):
                await pool.violation("1", DIGITS)
    assert [line["reason"] for line in logs if line["event"] == "json_schema_check_not_started"] == [
        "No such file or directory"
    ]
    pool._quick._not_before = 0.0
    assert await pool.violation("1", DIGITS) is None


async def test_a_program_that_is_not_a_helper_is_named(pool: CheckPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(NotChecked, match="no helper process can be started"):
        await pool.unsatisfiable(DIGITS)


# -- limits of the process itself, with patterns that the bounds would refuse


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["a{3000000}", "(?:ab?){9000000}"])
async def test_memory_is_limited_and_a_helper_that_has_grown_ends(pattern: str) -> None:
    helper = await HelperProcess.start()
    try:
        reply = check_pool._decode_reply(await helper.ask(request(pattern, cpu_s=30), 60))
        assert (reply.kind, reply.last) == ("memory", True)
        await until(lambda: not helper.is_alive, what="the helper has ended")
    finally:
        helper.close()


async def test_cpu_time_is_limited_by_the_kernel() -> None:
    helper = await HelperProcess.start()
    with pytest.raises(HelperDied) as died:
        await helper.ask(request("(a{1000}){1000}", cpu_s=0.05), 30)
    assert died.value.why == "cpu"
    helper.close()
    assert not runs(helper._process.pid)


# -- the end


@pytest.mark.slow
async def test_helpers_end_with_the_bus(connect: Connect) -> None:
    for end in ("close", "abort"):
        bus = await connect()
        pool = CheckPool(bus)
        await pool.violation("a", SLOW)
        bomb = asyncio.ensure_future(pool.violation(COSTLY_CONTENT, SLOW))
        await until(lambda pool=pool: pool._slow._helper, what="the bomb is in the slow lane")
        assert await pool.violation("1", DIGITS) is None
        pids = [pid_of(pool._quick), pid_of(pool._slow)]
        bomb.cancel()
        if end == "close":
            await bus.close()
        else:
            bus.abort()
        await until(lambda pids=pids: not any(map(runs, pids)), what=f"the helpers end with {end}")
        await asyncio.gather(bomb, return_exceptions=True)


PARENT = """
import asyncio, os, sys, time
from loom.phases.shared.check_process import HelperProcess
from loom.schemas.base import encode
async def main():
    helper = await HelperProcess.start()
    print(helper._process.pid, flush=True)
    if sys.argv[1] == "forked":
        child = os.fork()
        if not child:
            time.sleep(60)
        print(child, flush=True)
    if sys.argv[1] == "busy":
        bomb = {"cpu_s": 1, "pattern": "(a|a|aa)+$", "json_schema": None, "content": "a" * 65000 + "!"}
        await helper.ask(encode(bomb), 60)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("state", ["idle", "busy"])
async def test_a_helper_ends_when_its_parent_is_killed(state: str) -> None:
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, state, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert runs(pid)
    assert os.getsid(pid) == pid  # Ctrl-C in the parent's terminal does not reach it
    parent.kill()
    await parent.wait()
    await until(lambda: not runs(pid), what="the helper ends")


@pytest.mark.slow
def test_a_helper_ends_though_a_forked_child_of_its_parent_holds_its_socket() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, "forked"], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid, child = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    try:
        asyncio.run(until(lambda: not runs(pid), within_s=30, what="the helper ends"))
        assert runs(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_pool_works_in_a_thread_and_installs_no_signal_handler(nats_url: str, namespace: str) -> None:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    outcomes = []

    async def use() -> None:
        async with Bus(nats_url, namespace=namespace) as bus:
            outcomes.append(await CheckPool(bus).violation("1", DIGITS))

    for _ in range(2):
        thread = threading.Thread(target=asyncio.run, args=(use(),))
        thread.start()
        thread.join(30)
    assert outcomes == [None, None]
    assert before == {number: signal.getsignal(number) for number in signal.valid_signals()}


async def test_a_helper_gets_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    helper = await HelperProcess.start()
    try:
        assert b"sk-secret" not in environment(helper._process.pid)
    finally:
        helper.close()
