"""The account of a cluster under faults: what was accepted must be found ended, once, and nothing may be left over.

Run as a script for a long account: `python -m support.invariants --tasks 2000 --kills 60 --seed 1`, with tests/ on
PYTHONPATH; with `--parts 8 --tasks 50` the tasks are divided, and what a subtask costs is measured first. With
`--mixed` some tasks are cancelled, some delegate, some are divided, and processes are also stopped for 5 to 40 s.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loom.bus import task_client, topology
from loom.bus.bus import Bus
from loom.bus.natsio.ordered_consumer import OrderedConsumer
from loom.bus.queries import records_stream
from loom.bus.records import records
from loom.bus.stored_rewards import reward_in
from loom.bus.topology import stream_state
from loom.phases.adapt.evidence import apply_reward
from loom.runner.server.nats_server import NatsServer
from loom.schemas.base import decode, new_id
from loom.schemas.envelope import PHASES
from loom.schemas.errors import LoomError
from loom.schemas.learning import NodeProfile, Reward
from loom.schemas.plan import SplitPlan
from loom.schemas.record import TaskRecord
from loom.schemas.task import TaskAd, TaskState
from support.kill_schedule import Cast, schedule
from support.wait import until

AGENTS = Path(__file__).parents[1] / "data" / "ledger_agents.py"
AT_ONCE = 64
NODES = ("ada", "ben", "cyd")
SUFFERING = ("scale", "execute", "all", *NODES)
"""What dies while tasks are divided."""
CANCELLED, DELEGATING, DIVIDED = 3, 5, 8
"""Last digits of the numbers of tasks that are cancelled, delegate or are divided."""
MIXED_PARTS = 3
LONGEST_BEFORE_CANCEL_S = 0.5
MEASURED = 20
"""Tasks of each kind by which the cost of a subtask is measured."""


@dataclass
class Ledger:
    """Submits tasks and keeps what was promised about each."""

    bus: Bus
    parts: int = 0
    """Subtasks of each task; their graphs are drawn by a seeded dice."""
    mixed: bool = False
    """Whether of ten tasks one is cancelled soon, one delegates and one is divided."""
    dice: random.Random = field(default_factory=random.Random)
    accepted: set[str] = field(default_factory=set)
    refused: int = 0
    ended: dict[str, tuple[TaskState, float | None]] = field(default_factory=dict)
    """Task -> how and when it ended, as first seen."""
    cancelled: set[str] = field(default_factory=set)
    """Tasks whose cancellation was answered."""
    twice: list[str] = field(default_factory=list)
    """Tasks whose end has changed."""

    async def submit(self, count: int, per_s: float) -> None:
        """Submit so many tasks at that pace, every other one over the subject that any language uses."""
        room = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> None:
            async with room:
                await self._submit(number)

        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(one(number))
                await asyncio.sleep(1 / per_s)

    def ad(self, number: int) -> TaskAd:
        """Return the ad of that number."""
        divided = MIXED_PARTS if self.mixed and number % 10 == DIVIDED else self.parts
        verb = "delegate" if self.mixed and number % 10 == DELEGATING else "entry"
        return TaskAd(
            task_id=new_id(),
            description=f"{verb} {number}",
            domain="code",
            wait=False,
            timeout_s=600,
            context=random_plan(divided, self.dice) if divided else {},
        )

    async def _submit(self, number: int) -> None:
        ad = self.ad(number)
        try:
            if number % 2:
                await task_client.ask(self.bus, self.bus.subjects.submit, ad, timeout_s=8)
            else:
                await (await task_client.publish(self.bus, ad, deltas=False)).close()
        except (LoomError, TimeoutError):
            self.refused += 1  # perhaps stored, but nothing was promised
        else:
            self.accepted.add(ad.task_id)
            if self.mixed and number % 10 == CANCELLED:
                await self._cancel(ad.task_id)

    async def _cancel(self, task_id: str) -> None:
        """Cancel a task a moment after its submission; without an answer nothing is promised."""
        await asyncio.sleep(self.dice.uniform(0, LONGEST_BEFORE_CANCEL_S))
        try:
            await task_client.cancel(self.bus, task_id)
        except (LoomError, TimeoutError):
            return
        self.cancelled.add(task_id)

    async def watch(self) -> None:
        """Note the first end of each task; a different one later is a broken promise."""
        reader = records(self.bus).reader()
        while True:
            for entry in await reader.batch():
                self._note(entry.value)

    def _note(self, record: TaskRecord) -> None:
        if not record.ended:
            if record.task_id in self.ended:
                self.twice.append(record.task_id)
            return
        end = (record.state, record.ended_at)
        if self.ended.setdefault(record.task_id, end) != end:
            self.twice.append(record.task_id)

    async def settled(self, within_s: float) -> None:
        """Wait until every accepted task has ended and no work is left in the streams."""

        async def nothing_left() -> bool:
            try:
                left = [(await stream_state(self.bus, name))["messages"] for name in ("INTAKE", "TASKS")]
            except LoomError:
                return False
            return not any(left) and self.accepted <= set(self.ended)

        try:
            await until(nothing_left, within_s=within_s, what="all accepted tasks end and the streams are empty")
        except AssertionError as error:
            open_ones = sorted(self.accepted - set(self.ended))
            raise AssertionError(f"{error}; {len(open_ones)} are open: {open_ones[:9]}") from None


def random_plan(parts: int, dice: random.Random) -> dict[str, Any]:
    """Return the context of an ad that asks for so many subtasks, in any graph."""
    names = [f"s{n}" for n in range(parts)]
    plan = [
        {
            "id": name,
            "description": f"part {name}",
            "dependencies": dice.sample(names[:n], k=min(n, dice.randint(0, 2))),
        }
        for n, name in enumerate(names)
    ]
    dice.shuffle(plan)
    return {"plan": plan}


def chain(parts: int) -> dict[str, Any]:
    """Return the context of an ad whose subtasks wait for one another: nothing of them is side by side."""
    plan = [{"id": f"s{n}", "description": "nothing", "dependencies": [f"s{n - 1}"] if n else []} for n in range(parts)]
    return {"plan": plan}


@dataclass(frozen=True)
class Books:
    """What the streams hold in the end."""

    records: dict[str, TaskRecord]
    rewards: list[tuple[int, Reward]]
    profiles: dict[str, NodeProfile]
    dead: int
    plans: dict[str, SplitPlan]

    def refolded(self) -> dict[str, NodeProfile]:
        """The profiles as a rebuild from the stream alone makes them."""
        rebuilt: dict[str, NodeProfile] = {}
        for seq, reward in self.rewards:
            known = rebuilt.get(reward.node_key, NodeProfile(node_id=reward.node_id, owner=reward.owner))
            rebuilt[reward.node_key] = apply_reward(known, reward, seq, forget=True)
        return rebuilt

    def unrewarded(self) -> list[str]:
        """Tasks that succeeded although the node that did them earned nothing."""
        known = {reward.reward_id for _, reward in self.rewards}
        return [
            task_id
            for task_id, record in self.records.items()
            if record.state == "succeeded" and f"{task_id}:{record.envelope.attempt}:rules" not in known
        ]


async def read_books(bus: Bus) -> Books:
    stream, subject = records_stream(bus)
    found = {}
    for message in await _all(OrderedConsumer(bus.jetstream, stream, filter=subject, deliver="last_per_subject")):
        record = decode(message.data, TaskRecord)
        found[record.task_id] = record
    stored = await _all(
        OrderedConsumer(
            bus.jetstream, bus.subjects.stream("REWARDS"), filter=bus.subjects.of("reward", "*", "*", "*", "*")
        )
    )
    usable = [(message.seq, reward_in(message, bus.subjects, bus.discards)) for message in stored]
    rewards = [(seq, reward) for seq, reward in usable if reward is not None]
    profiles = {}
    for name in {reward.node_key for _, reward in rewards}:
        entry = await bus.bucket("nodes", NodeProfile).get(name)
        if entry is not None:
            profiles[name] = entry.value
    return Books(
        records=found,
        rewards=rewards,
        profiles=profiles,
        dead=(await stream_state(bus, "DEAD"))["messages"],
        plans={
            task_id: plan.value
            for task_id, record in found.items()
            if "plan" in record.envelope.ad.context and (plan := await bus.bucket("plans", SplitPlan).get(task_id))
        },
    )


async def _all(reader: OrderedConsumer) -> list:
    found: list = []
    try:
        while not reader.caught_up:
            found += await reader.batch()
    finally:
        await reader.stop()
    return found


async def account(
    folder: Path,
    *,
    count: int,
    per_s: float,
    kills: int,
    every_s: float,
    seed: int,
    ack_wait_s: int,
    parts: int = 0,
    mixed: bool = False,
) -> str:
    """Submit tasks while things die, check the books, and return the figures.

    Args:
        parts: Subtasks each task is divided into. Then only what works on those dies: SCALE, EXECUTE and nodes.

        mixed: Whether some tasks are cancelled, delegate or are divided, and every third kill stops a process instead.

    Raises:
        AssertionError: A promise was broken.
    """
    runs = folder / "runs"
    runs.touch()
    started = time.monotonic()
    server = NatsServer(folder / "store")
    server.start()
    phases = {name: [name] for name in PHASES} | {"all": PHASES}
    env = {"LEDGER_RUNS": str(runs), "TEST_ACK_WAIT_S": str(ack_wait_s), "LOOM_LOG_LEVEL": "info"}
    try:
        async with (
            Bus(server.url) as bus,
            Cast(server, folder, phases, NODES, AGENTS, env) as cast,
        ):
            await until(lambda: _is_up(bus), within_s=30, what="the cluster is up")
            cost = await overhead(bus, parts) if parts else ""
            ledger = Ledger(bus, parts, mixed, random.Random(seed))
            watching = asyncio.ensure_future(ledger.watch())
            async with asyncio.TaskGroup() as group:
                group.create_task(ledger.submit(count, per_s))
                targets = SUFFERING if parts else cast.targets
                group.create_task(cast.suffer(schedule(seed, targets, kills, every_s, stops=mixed)))
            calm = time.monotonic()
            await ledger.settled(within_s=180)
            books = await _learned(bus)
            watching.cancel()
            assert not watching.done() or watching.cancelled()
            check(ledger, books, runs.read_text().splitlines())
            return figures(ledger, books, cast, time.monotonic() - started, time.monotonic() - calm) + cost
    finally:
        await asyncio.to_thread(server.stop)


async def _is_up(bus: Bus) -> bool:
    try:
        await topology.stream_state(bus, "DEAD")
        probe = await task_client.publish(bus, TaskAd(task_id=new_id(), description="is anybody there?", domain="code"))
        return (await probe.result(20)).success
    except (LoomError, TimeoutError):
        return False


async def _learned(bus: Bus) -> Books:
    """Wait until ADAPT has folded the whole stream, and return the books."""

    async def folded() -> Books | None:
        books = await read_books(bus)
        return books if books.refolded() == books.profiles else None

    books = await until(folded, within_s=30, what="the profiles equal a rebuild from the stream")
    assert books is not None
    return books


def check(ledger: Ledger, books: Books, runs: list[str]) -> None:
    lost = [task_id for task_id in ledger.accepted if not _ended(books, task_id)]
    assert not lost, f"{len(lost)} accepted tasks have not ended: {lost[:5]}"
    unfinished = [task_id for task_id, record in books.records.items() if not record.ended]
    assert not unfinished, f"records without an end: {unfinished[:5]}"
    assert not ledger.twice, f"ended twice: {ledger.twice[:5]}"
    again = [run for run, times in Counter(runs).items() if times > 1]
    assert not again, f"attempts that ran twice: {again[:5]}"
    check_plans(ledger, books)
    cancelled = [task_id for task_id in ledger.cancelled if not _ended(books, task_id)]
    assert not cancelled, f"cancelled tasks that go on: {cancelled[:5]}"
    assert not books.unrewarded(), f"successes without a reward: {books.unrewarded()[:5]}"
    counted = sum(profile.total_tasks for profile in books.profiles.values())
    earned = len({reward.reward_id for _, reward in books.rewards})
    assert counted <= earned, f"{earned} rewards were counted as {counted}"  # one that comes late may not matter


def check_plans(ledger: Ledger, books: Books) -> None:
    """Every divided task has a plan that is over, and each of its subtasks a record of its own."""
    divided = [task_id for task_id in ledger.accepted if "plan" in books.records[task_id].envelope.ad.context]
    for task_id in divided:
        record, plan = books.records[task_id], books.plans.get(task_id)
        if plan is None:
            assert record.state != "succeeded", f"{task_id} succeeded without a plan"
            continue
        assert plan.state == "done", f"{task_id}: its plan is {plan.state}"
        children = [books.records.get(part.child_id or "") for part in plan.subtasks]
        if record.state == "succeeded":
            assert [child.state if child else "" for child in children] == ["succeeded"] * len(children), task_id
            assert list(record.envelope.inputs) == [part.id for part in plan.subtasks], task_id


async def overhead(bus: Bus, parts: int) -> str:
    """Return what a subtask costs, in a cluster where nothing dies, beside a task that is not divided.

    The subtasks do nothing and wait for one another, so that a divided task takes as long as all of them.
    """

    async def took_s(context: dict[str, Any]) -> float:
        begun = time.monotonic()
        ad = TaskAd(task_id=new_id(), description="nothing", domain="code", context=context)
        handle = await task_client.publish(bus, ad, deltas=False)
        assert (await handle.result(60)).success
        return time.monotonic() - begun

    plain = statistics.median([await took_s({}) for _ in range(MEASURED)])
    divided = statistics.median([await took_s(chain(parts)) for _ in range(MEASURED)])
    each = (divided - plain) / parts
    return (
        f"\nunsplit task: {plain * 1000:.1f} ms; {parts} subtasks in a chain: {divided * 1000:.1f} ms, "
        f"{each * 1000:.1f} ms each, overhead {(each - plain) * 1000:+.1f} ms"
    )


def _ended(books: Books, task_id: str) -> bool:
    record = books.records.get(task_id)
    return record is not None and record.ended


def figures(ledger: Ledger, books: Books, cast: Cast, took_s: float, calm_s: float) -> str:
    ends = Counter(
        record.state if record.envelope.error is None else f"{record.state} ({record.envelope.error.code})"
        for record in books.records.values()
    )
    attempts = Counter(record.envelope.attempt for record in books.records.values())
    failed = Counter(tried.code for record in books.records.values() for tried in record.envelope.failed_attempts)
    repeated = len(books.rewards) - len({reward.reward_id for _, reward in books.rewards})
    began = Counter(part.state for plan in books.plans.values() for part in plan.subtasks)
    waits = sorted(
        (record.ended_at or 0) - (record.envelope.deadline - record.envelope.ad.timeout_s)
        for record in books.records.values()
    )
    return "\n".join(
        (
            f"{len(ledger.accepted)} accepted, {ledger.refused} not acknowledged, 0 lost, in {took_s:.0f} s",
            f"ends: {dict(ends)}, after a median of {waits[len(waits) // 2]:.2f} s, the slowest {waits[-1]:.1f} s",
            f"attempts needed: {dict(sorted(attempts.items()))}, failed ones: {dict(failed)}",
            f"kills: {sum(cast.killed.values())}, {dict(sorted(cast.killed.items()))}; quiet {calm_s:.1f} s later",
            f"divided: {len(books.plans)}, their subtasks: {dict(began)}",
            f"rewards: {len(books.rewards)}, {repeated} of them repeated and counted once; dead letters: {books.dead}",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("tasks", 2000), ("kills", 60), ("seed", 1), ("ack-wait", 30), ("parts", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--per-s", type=float, default=25)
    parser.add_argument("--every-s", type=float, default=1.2)
    parser.add_argument("--mixed", action="store_true", help="Cancels, delegations, divided tasks, stopped processes.")
    parser.add_argument("--keep", type=Path, help="Folder for logs and streams.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as private:
        folder = given.keep or Path(private)
        folder.mkdir(parents=True, exist_ok=True)
        told = account(
            folder,
            count=given.tasks,
            per_s=given.per_s,
            kills=given.kills,
            every_s=given.every_s,
            seed=given.seed,
            ack_wait_s=given.ack_wait,
            parts=given.parts,
            mixed=given.mixed,
        )
        print(asyncio.run(told))


if __name__ == "__main__":
    main()
