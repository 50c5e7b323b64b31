"""The shared-exclusive lock: many holders together, or one alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hypothesis import given, settings
from hypothesis import strategies as st
from support.wait import until

from loom.bus.hops.isolation import SharedExclusiveLock


class Visitors:
    """Tasks that acquire the lock and hold it until `leave`."""

    def __init__(self) -> None:
        self.gate = SharedExclusiveLock()
        self.inside: list[str] = []
        self.entered: list[str] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._leave: dict[str, asyncio.Event] = {}

    def arrive(self, name: str, *, alone: bool = False) -> None:
        self._leave[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._visit(name, alone=alone))

    async def _visit(self, name: str, *, alone: bool) -> None:
        await self.gate.acquire(exclusive=alone)
        try:
            self.entered.append(name)
            self.inside.append(name)
            assert not alone or self.inside == [name]
            await self._leave[name].wait()
            self.inside.remove(name)
        finally:
            self.gate.release(exclusive=alone)

    async def leave(self, name: str) -> None:
        self._leave[name].set()
        await self._tasks[name]
        await settled()

    async def give_up(self, name: str) -> None:
        self._tasks[name].cancel()
        await asyncio.gather(self._tasks[name], return_exceptions=True)
        await settled()

    async def end(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


async def settled() -> None:
    """Run the event loop until no task is ready."""
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def visitors() -> AsyncIterator[Visitors]:
    guests = Visitors()
    yield guests
    await guests.end()


async def test_many_are_inside_together() -> None:
    async with visitors() as guests:
        for n in range(100):
            guests.arrive(str(n))
        await settled()
        assert len(guests.inside) == 100


async def test_an_exclusive_task_waits_for_all_and_blocks_all() -> None:
    async with visitors() as guests:
        guests.arrive("a")
        guests.arrive("b")
        await settled()
        guests.arrive("suspect", alone=True)
        guests.arrive("c")
        await settled()
        assert guests.inside == ["a", "b"]

        await guests.leave("a")
        assert guests.inside == ["b"]
        await guests.leave("b")
        assert guests.inside == ["suspect"]
        await guests.leave("suspect")
        assert guests.inside == ["c"]


async def test_a_waiting_exclusive_task_is_not_starved_by_new_arrivals() -> None:
    async with visitors() as guests:
        guests.arrive("first")
        await settled()
        guests.arrive("suspect", alone=True)
        await settled()
        for n in range(20):
            guests.arrive(f"late {n}")
        await settled()
        await guests.leave("first")
        assert guests.inside == ["suspect"]


async def test_suspects_go_in_order_of_arrival() -> None:
    async with visitors() as guests:
        for name in "abcde":
            guests.arrive(name, alone=True)
        await settled()
        for name in "abcde":
            assert guests.inside == [name]
            await guests.leave(name)
        assert guests.entered == list("abcde")


async def test_a_suspect_that_arrives_at_a_free_gate_does_not_jump_the_queue() -> None:
    gate = SharedExclusiveLock()
    order: list[str] = []

    async def enter(name: str) -> None:
        await gate.acquire(exclusive=True)
        order.append(name)

    await gate.acquire(exclusive=True)
    tasks = [asyncio.create_task(enter("first"))]
    await settled()
    gate.release(exclusive=True)
    tasks.append(asyncio.create_task(enter("second")))  # before "first" has run
    await settled()
    assert order == ["first"]
    gate.release(exclusive=True)
    await asyncio.gather(*tasks)
    assert order == ["first", "second"]


async def test_a_cancelled_wait_leaves_the_gate_usable() -> None:
    async with visitors() as guests:
        guests.arrive("a")
        await settled()
        guests.arrive("suspect", alone=True)
        guests.arrive("b")
        await settled()
        assert guests.inside == ["a"]
        await guests.give_up("suspect")
        assert guests.inside == ["a", "b"]

        guests.arrive("another", alone=True)
        await settled()
        await guests.leave("a")
        await guests.leave("b")
        assert guests.inside == ["another"]
        guests.arrive("c")
        await settled()
        await guests.give_up("c")
        await guests.leave("another")
        assert guests.inside == []
        guests.arrive("d", alone=True)
        await settled()
        assert guests.inside == ["d"]


async def test_a_grant_that_coincides_with_a_cancellation_passes_to_the_next_waiter() -> None:
    gate = SharedExclusiveLock()
    await gate.acquire(exclusive=True)
    waiting = asyncio.create_task(gate.acquire(exclusive=True))
    behind = asyncio.create_task(gate.acquire(exclusive=False))
    await settled()
    gate.release(exclusive=True)  # its turn
    waiting.cancel()  # before it could run
    await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.wait_for(behind, 1)
    gate.release(exclusive=False)
    await asyncio.wait_for(gate.acquire(exclusive=True), 1)


steps = st.lists(
    st.tuples(st.sampled_from(["arrive", "arrive alone", "leave", "give up"]), st.integers(0, 30)), max_size=40
)


@settings(deadline=None, max_examples=100)
@given(steps=steps)
def test_a_suspect_is_always_alone_and_an_open_gate_has_no_waiters(steps: list[tuple[str, int]]) -> None:
    async def play() -> None:
        async with visitors() as guests:
            there: list[str] = []
            for n, (step, which) in enumerate(steps):
                if step.startswith("arrive"):
                    name = f"{n}{' alone' if step == 'arrive alone' else ''}"
                    there.append(name)
                    guests.arrive(name, alone=name.endswith("alone"))
                    await settled()
                elif step == "leave" and guests.inside:
                    name = guests.inside[which % len(guests.inside)]
                    there.remove(name)
                    await guests.leave(name)
                elif step == "give up" and (waiting := [name for name in there if name not in guests.inside]):
                    name = waiting[which % len(waiting)]
                    there.remove(name)
                    await guests.give_up(name)
                alone = [name for name in guests.inside if name.endswith("alone")]
                assert not alone or len(guests.inside) == 1
                assert guests.inside or not there
            while there:  # every task acquires and releases the lock
                await until(lambda: guests.inside, within_s=1, what="a task has the lock")
                there.remove(name := guests.inside[0])
                await guests.leave(name)

    asyncio.run(play())
