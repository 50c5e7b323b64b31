"""The benchmark itself: its raw pipe carries, and what it prints says what was measured."""

import asyncio
import os

import pytest
from bench.loop import IN_FLIGHT, LOOP, PEER, RAW, SPREAD, checks, measure, ratio, report
from bench.measure import Load, closed_loop
from bench.raw_pipe import raw_pipe

pytestmark = pytest.mark.usefixtures("server")


async def test_the_raw_pipe_carries_every_task_and_leaves_nothing_behind() -> None:
    async with asyncio.timeout(20), raw_pipe() as pipe:
        times = await pipe.carry(50, 8)
        assert len(times) == 50
        assert all(0 < each < 20 for each in times)
        assert len(await pipe.carry(3, 8)) == 3  # fewer than may be under way
        assert await pipe.stored() == 6 * 53
