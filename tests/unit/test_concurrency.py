"""Writes that do not wait for each other."""

import asyncio

import pytest

from loom.phases.adapt.concurrency import CONCURRENT, for_each


async def test_so_many_writes_wait_at_a_time_and_no_more() -> None:
    waiting, most, written = 0, 0, list[int]()

    async def write(number: int) -> None:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        await asyncio.sleep(0)
        waiting -= 1
        written.append(number)

    await for_each(range(3 * CONCURRENT + 1), write)
    assert most == CONCURRENT
    assert sorted(written) == list(range(3 * CONCURRENT + 1))


async def test_an_error_is_raised_after_the_others_of_its_time_have_ended() -> None:
    written = list[int]()

    async def write(number: int) -> None:
        await asyncio.sleep(0)
        if number == 3:
            raise ValueError(number)
        written.append(number)

    with pytest.raises(ValueError, match="3"):
        await for_each(range(2 * CONCURRENT), write)
    assert written == [number for number in range(CONCURRENT) if number != 3]
