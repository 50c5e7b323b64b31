"""Typed key-value buckets: compare-and-set, and readers of changes."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import nats
import pytest
from support.bus_helpers import Connect, back, envelope
from support.logs import capture_logs
from support.wait import until

from loom.bus.bus import Bus
from loom.bus.natsio import publishing
from loom.bus.natsio.kv import Bucket, BucketReader, Entry
from loom.bus.natsio.server_errors import Conflict, Refused
from loom.bus.natsio.transport.message import Msg
from loom.bus.records import records
from loom.runner.server.nats_server import NatsServer
from loom.schemas.base import Undecodable, encode
from loom.schemas.envelope import Claim
from loom.schemas.errors import BusUnavailable
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.record import TaskRecord


def profile(node_id: str = "n1", tasks: int = 0) -> NodeProfile:
    return NodeProfile(node_id=node_id, total_tasks=tasks)


@pytest.fixture
def bucket(bus: Bus) -> Bucket[NodeProfile]:
    return bus.bucket("nodes", NodeProfile)


async def test_a_value_that_was_created_is_read_with_its_revision(bucket: Bucket[NodeProfile]) -> None:
    assert await bucket.get("n1") is None
    revision = await bucket.create("n1", profile(tasks=1))
    assert await bucket.get("n1") == Entry("n1", profile(tasks=1), revision)
    assert await bucket.get("n2") is None


async def test_a_key_is_created_once(bucket: Bucket[NodeProfile]) -> None:
    await bucket.create("n1", profile(tasks=1))
    with pytest.raises(Conflict):
        await bucket.create("n1", profile(tasks=2))
    assert (await bucket.get("n1") or pytest.fail("gone")).value.total_tasks == 1


async def test_an_update_needs_the_last_revision(bucket: Bucket[NodeProfile]) -> None:
    first = await bucket.create("n1", profile(tasks=1))
    await bucket.create("n2", profile("n2"))  # another key's revision does not matter
    second = await bucket.update("n1", profile(tasks=2), first)
    assert second > first
    with pytest.raises(Conflict):
        await bucket.update("n1", profile(tasks=3), first)
    assert await bucket.get("n1") == Entry("n1", profile(tasks=2), second)


async def test_the_same_value_written_by_another_is_a_conflict_all_the_same(bucket: Bucket[NodeProfile]) -> None:
    first = await bucket.create("n1", profile(tasks=1))
    await bucket.update("n1", profile(tasks=2), first)
    with pytest.raises(Conflict):  # a writer that counts must not take the step of another for its own
        await bucket.update("n1", profile(tasks=2), first)


async def test_eight_writers_that_count_lose_no_step(connect: Connect, bucket: Bucket[NodeProfile]) -> None:
    await bucket.create("n1", profile())

    async def count(steps: int) -> None:
        own = (await connect()).bucket("nodes", NodeProfile)
        while steps:
            entry = await own.get("n1")
            assert entry is not None
            try:
                await own.update("n1", profile(tasks=entry.value.total_tasks + 1), entry.revision)
            except Conflict:
                await asyncio.sleep(random.uniform(0, 0.005))
            else:
                steps -= 1

    await asyncio.gather(*(count(10) for _ in range(8)))
    assert (await bucket.get("n1") or pytest.fail("gone")).value.total_tasks == 80


async def test_a_repeated_write_whose_acknowledgement_was_lost_does_not_conflict_with_itself(
    bus: Bus, bucket: Bucket[NodeProfile], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, opened = bus.requests.open_inbox, list[str]()

    def deaf_once(sink: Callable[[Msg], None]) -> str:
        opened.append(real(sink if opened else lambda _: None))
        return opened[-1]

    monkeypatch.setattr(publishing, "TRY_S", 0.1)
    monkeypatch.setattr(bus.requests, "open_inbox", deaf_once)
    revision = await bucket.create("n1", profile(tasks=1))
    assert len(opened) >= 2
    assert await bucket.get("n1") == Entry("n1", profile(tasks=1), revision)


@pytest.mark.slow
async def test_a_repeated_write_another_has_overtaken_is_a_conflict(
    bus: Bus, connect: Connect, bucket: Bucket[NodeProfile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer cannot know whether its own write was stored: it must read again."""
    first = await bucket.create("n1", profile())
    other = (await connect()).bucket("nodes", NodeProfile)
    real, lost = bus.requests.open_inbox, asyncio.Event()

    def deaf_once(sink: Callable[[Msg], None]) -> str:
        if lost.is_set():
            return real(sink)
        return real(lambda _: lost.set())

    monkeypatch.setattr(publishing, "TRY_S", 1)
    monkeypatch.setattr(bus.requests, "open_inbox", deaf_once)
    writing = asyncio.ensure_future(bucket.update("n1", profile(tasks=1), first))
    await asyncio.wait_for(lost.wait(), 5)
    current = await other.get("n1")
    assert current is not None
    await other.update("n1", profile(tasks=2), current.revision)
    with pytest.raises(Conflict):
        await writing


async def test_a_missing_bucket_is_refused(plain: Bus) -> None:
    with pytest.raises(Refused):
        await plain.bucket("nodes", NodeProfile).get("n1")


async def test_a_value_of_another_shape_is_undecodable(bus: Bus, bucket: Bucket[NodeProfile]) -> None:
    await bus.jetstream.publish(f"$KV.{bus.subjects.bucket('nodes')}.n1", b"\xffnonsense")
    with pytest.raises(Undecodable):
        await bucket.get("n1")


async def test_the_layout_is_the_one_every_nats_client_reads(
    nats_url: str, bus: Bus, bucket: Bucket[NodeProfile]
) -> None:
    revision = await bucket.create("n1", profile(tasks=1))
    nc = await nats.connect(nats_url)
    kv = await nc.jetstream().key_value(bus.subjects.bucket("nodes"))
    entry = await kv.get("n1")
    assert (entry.value, entry.revision, entry.operation) == (encode(profile(tasks=1)), revision, None)
    theirs = await kv.put("n2", encode(profile("n2")))
    await nc.close()
    assert await bucket.get("n2") == Entry("n2", profile("n2"), theirs)


async def test_a_key_deleted_by_an_operator_is_absent_and_may_be_created_again(
    nats_url: str, bus: Bus, bucket: Bucket[NodeProfile]
) -> None:
    first = await bucket.create("n1", profile(tasks=1))
    nc = await nats.connect(nats_url)
    await (await nc.jetstream().key_value(bus.subjects.bucket("nodes"))).delete("n1")
    await nc.close()
    assert await bucket.get("n1") is None
    with pytest.raises(Conflict):
        await bucket.update("n1", profile(tasks=2), first)
    revision = await bucket.create("n1", profile(tasks=3))
    assert await bucket.get("n1") == Entry("n1", profile(tasks=3), revision)


# -- readers


class Follower:
    """Collects the entries of a reader."""

    def __init__(self, reader: BucketReader[NodeProfile]) -> None:
        self.reader = reader
        self.entries: list[Entry[NodeProfile]] = []
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            self.entries += await self.reader.batch()

    async def got(self, tasks: list[int], within_s: float = 20) -> None:
        """Wait until these counts were read, in this order and no others."""
        await until(lambda: len(self.entries) >= len(tasks), within_s=within_s, what=f"{len(tasks)} values")
        assert [entry.value.total_tasks for entry in self.entries] == tasks

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.reader.stop()


@pytest.fixture
async def followers() -> AsyncIterator[list[Follower]]:
    started: list[Follower] = []
    yield started
    for follower in started:
        await follower.stop()


async def test_a_reader_gives_all_values_and_then_every_change(
    bucket: Bucket[NodeProfile], followers: list[Follower]
) -> None:
    for n in (1, 2, 3):
        await bucket.create(f"n{n}", profile(f"n{n}", tasks=n))
    revision = await bucket.create("old", profile(tasks=0))
    await bucket.update("old", profile(tasks=4), revision)
    followers.append(follower := Follower(bucket.reader()))
    await follower.got([1, 2, 3, 4])
    assert [entry.key for entry in follower.entries] == ["n1", "n2", "n3", "old"]

    entry = follower.entries[0]
    await bucket.update("n1", profile("n1", tasks=5), entry.revision)
    await bucket.create("n9", profile("n9", tasks=6))
    await follower.got([1, 2, 3, 4, 5, 6])
    assert follower.entries[-1] == await bucket.get("n9")


async def test_a_reader_of_an_empty_bucket_is_caught_up_at_once(bucket: Bucket[NodeProfile]) -> None:
    reader = bucket.reader()
    assert not reader.caught_up
    assert await asyncio.wait_for(reader.batch(), 5) == []
    assert reader.caught_up
    await reader.stop()


async def test_a_reader_has_caught_up_only_with_its_last_batch(bucket: Bucket[NodeProfile]) -> None:
    total = 1200  # more than one pull
    await asyncio.gather(*(bucket.create(f"n{n}", profile(f"n{n}", tasks=n)) for n in range(total)))
    reader, keys = bucket.reader(), set[str]()
    while not reader.caught_up:
        keys |= {entry.key for entry in await reader.batch()}
        await asyncio.sleep(0.02)  # more comes meanwhile, which is not read yet
    assert len(keys) == total
    await reader.stop()


async def test_a_value_that_cannot_be_read_is_left_out(
    bus: Bus, bucket: Bucket[NodeProfile], followers: list[Follower]
) -> None:
    await bus.jetstream.publish(f"$KV.{bus.subjects.bucket('nodes')}.bad", b"nonsense")
    await bucket.create("n1", profile(tasks=1))
    with capture_logs() as logs:
        followers.append(follower := Follower(bucket.reader()))
        await follower.got([1])
    assert [entry["event"] for entry in logs] == ["value_undecodable"]


async def test_a_reader_goes_on_after_the_server_was_killed(
    mortal: Bus, server: NatsServer, followers: list[Follower]
) -> None:
    bucket = mortal.bucket("nodes", NodeProfile)
    await bucket.create("n1", profile("n1", tasks=1))
    followers.append(follower := Follower(bucket.reader()))
    await follower.got([1])
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.restart)
    await back(mortal)
    await bucket.create("n2", profile("n2", tasks=2))
    await follower.got([1, 2], within_s=15)


# -- task records


def _record(**fields: object) -> TaskRecord:
    return TaskRecord(**{"task_id": "t1", "state": "running", "envelope": envelope(), "admitted_at": 1.0, **fields})  # type: ignore[arg-type]


def _claimed(record: TaskRecord) -> TaskRecord:
    return TaskRecord(
        task_id=record.task_id,
        state=record.state,
        envelope=record.envelope,
        admitted_at=record.admitted_at,
        claim=Claim(attempt=record.claim.attempt + 1),
    )


async def test_a_record_is_changed_by_deciding_again_after_every_conflict(bus: Bus, connect: Connect) -> None:
    await records(bus).create("t1", _record())

    async def claim() -> None:
        own = records(await connect())
        for _ in range(5):
            await own.update_with("t1", _claimed)

    await asyncio.gather(*(claim() for _ in range(3)))
    entry = await records(bus).get("t1")
    assert entry is not None
    assert entry.value.claim.attempt == 15


async def test_a_record_without_a_change_is_not_written(bus: Bus) -> None:
    assert await records(bus).update_with("t1", _claimed) is None
    revision = await records(bus).create("t1", _record())
    assert await records(bus).update_with("t1", lambda _: None) == Entry("t1", _record(), revision)
    entry = await records(bus).update_with("t1", _claimed)
    assert entry == await records(bus).get("t1")


async def test_a_record_that_changes_at_every_attempt_is_unavailable(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = records(bus)
    await bucket.create("t1", _record())

    async def overtaken(key: str, value: TaskRecord, revision: int) -> int:
        raise Conflict("wrong last sequence", 10071)

    monkeypatch.setattr(bucket, "update", overtaken)
    with pytest.raises(BusUnavailable, match="t1"):
        await bucket.update_with("t1", _claimed)
