"""The gate: many together, or one alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hypothesis import given, settings
from hypothesis import strategies as st
from support.wait import until

from loom.bus.hops.isolation import SharedExclusiveLock


class Visitors:
    """Tasks that enter a gate and stay until told."""

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
    """Let everything that can run, run."""
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def visitors() -> AsyncIterator[Visitors]:
    who = Visitors()
    yield who
    await who.end()


async def test_many_are_inside_together() -> None:
    async with visitors() as who:
        for n in range(100):
            who.arrive(str(n))
        await settled()
        assert len(who.inside) == 100


async def test_one_alone_waits_for_all_and_keeps_all_out() -> None:
    async with visitors() as who:
        who.arrive("a")
        who.arrive("b")
        await settled()
        who.arrive("suspect", alone=True)
        who.arrive("c")
        await settled()
        assert who.inside == ["a", "b"]

        await who.leave("a")
        assert who.inside == ["b"]
        await who.leave("b")
        assert who.inside == ["suspect"]
        await who.leave("suspect")
        assert who.inside == ["c"]


async def test_who_waits_to_be_alone_is_not_starved_by_new_arrivals() -> None:
    async with visitors() as who:
        who.arrive("first")
        await settled()
        who.arrive("suspect", alone=True)
        await settled()
        for n in range(20):
            who.arrive(f"late {n}")
        await settled()
        await who.leave("first")
        assert who.inside == ["suspect"]


async def test_suspects_go_in_order_of_arrival() -> None:
    async with visitors() as who:
        for name in "abcde":
            who.arrive(name, alone=True)
        await settled()
        for name in "abcde":
            assert who.inside == [name]
            await who.leave(name)
        assert who.entered == list("abcde")


async def test_a_suspect_that_comes_as_the_gate_falls_free_does_not_jump_the_queue() -> None:
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


async def test_who_gives_up_waiting_leaves_the_gate_usable() -> None:
    async with visitors() as who:
        who.arrive("a")
        await settled()
        who.arrive("suspect", alone=True)
        who.arrive("b")
        await settled()
        assert who.inside == ["a"]
        await who.give_up("suspect")
        assert who.inside == ["a", "b"]

        who.arrive("another", alone=True)
        await settled()
        await who.leave("a")
        await who.leave("b")
        assert who.inside == ["another"]
        who.arrive("c")
        await settled()
        await who.give_up("c")
        await who.leave("another")
        assert who.inside == []
        who.arrive("d", alone=True)
        await settled()
        assert who.inside == ["d"]


async def test_a_turn_that_comes_together_with_the_cancellation_is_passed_on() -> None:
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
def test_whatever_happens_a_suspect_is_alone_and_nobody_waits_before_an_open_gate(steps: list[tuple[str, int]]) -> None:
    async def play() -> None:
        async with visitors() as who:
            there: list[str] = []
            for n, (step, which) in enumerate(steps):
                if step.startswith("arrive"):
                    name = f"{n}{' alone' if step == 'arrive alone' else ''}"
                    there.append(name)
                    who.arrive(name, alone=name.endswith("alone"))
                    await settled()
                elif step == "leave" and who.inside:
                    name = who.inside[which % len(who.inside)]
                    there.remove(name)
                    await who.leave(name)
                elif step == "give up" and (waiting := [name for name in there if name not in who.inside]):
                    name = waiting[which % len(waiting)]
                    there.remove(name)
                    await who.give_up(name)
                alone = [name for name in who.inside if name.endswith("alone")]
                assert not alone or len(who.inside) == 1
                assert who.inside or not there
            while there:  # everybody gets in and out
                await until(lambda: who.inside, within_s=1, what="somebody enters")
                there.remove(name := who.inside[0])
                await who.leave(name)

    asyncio.run(play())
