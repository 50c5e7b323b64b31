"""Messages that cannot be handled or kill their process: each becomes a dead letter, and other tasks continue."""

import asyncio
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.command import command
from support.loop_harness import messages, settled
from support.nodes import echo, node
from support.poison_process import MARK
from support.raw_client import publish_raw, with_headers
from support.services import running_phases
from support.wait import until

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.dead_letters import admin
from loom.bus.dead_letters.admin import Letter
from loom.bus.hops.delivery import DEAD_AFTER
from loom.bus.records import records
from loom.bus.task_client import TaskHandle
from loom.phases.shared.scale_rule import PLAN_KEY
from loom.runner.services import running_nodes
from loom.schemas import base
from loom.schemas.base import MAX_MESSAGE_BYTES, decode, encode
from loom.schemas.envelope import PHASES, Envelope, Hop, Phase
from loom.schemas.errors import DeadLettered
from loom.schemas.record import TaskRecord
from loom.schemas.run import RunRequest
from loom.schemas.task import Submission, TaskAd

WITHIN_S = 30
LANES = ("intake", "sense", "match", "scale", "execute", "evaluate")
TO_SCALE = {PLAN_KEY: True}
"""Context of a task that passes SCALE, which keeps it whole because no model can plan it."""
DEEP = b"[" * 1200 + b"]" * 1200


class Kind(NamedTuple):
    """A way to corrupt a valid message."""

    spoil: Callable[[bytes], bytes]
    reason: str
    lanes: tuple[str, ...] = LANES


def instead(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def spoil(raw: bytes) -> bytes:
        assert old in raw
        return raw.replace(old, new, 1)

    return spoil


KINDS = {
    "nothing": Kind(lambda _: b"", "Input data was truncated"),
    "not JSON": Kind(lambda _: b"loom", "JSON is malformed"),
    "JSON that ends too early": Kind(lambda raw: raw[:-2], "Input data was truncated"),
    "not UTF-8": Kind(instead(b"count", b"c\xff\xfe"), "'utf-8' codec can't decode"),
    "half a character": Kind(instead(b"count", rb"\ud800"), "surrogate"),
    "a control character": Kind(instead(b"count", b"\x1b[31m\x00"), "invalid character"),
    "nested too deeply": Kind(instead(b'"context":{}', b'"context":{"a":%s}' % DEEP), "nested too deeply"),
    "nested in an unknown field": Kind(instead(b'{"ad"', b'{"what":%s,"ad"' % DEEP), "nested too deeply"),
    "another shape": Kind(lambda _: b'[{"ad":1}]', "Expected `object`, got `array`"),
    "an integer for a text": Kind(instead(b'"count the words"', b"7"), r"Expected `str`, got `int` - at `\$\.ad"),
    "not a number": Kind(instead(b"55.5", b"NaN"), "invalid character"),
    "an infinite number": Kind(instead(b"55.5", b"1e999"), "out of range"),
    "a number out of range": Kind(instead(b"55.5", b"-1"), r"> 0.0 - at `\$\.ad\.timeout_s"),
    "a field too few": Kind(lambda _: b"{}", "missing required field `ad`"),
    "an id that is not a token": Kind(instead(b'"task_id":"', b'"task_id":"a b'), r"at `\$\.ad\.task_id"),
    "a phase that is none": Kind(instead(b'"phase":"sense"', b'"phase":"brew"'), r"\$\.hops", LANES[1:]),
    "too large": Kind(lambda raw: raw.ljust(MAX_MESSAGE_BYTES + 1), f"at most {MAX_MESSAGE_BYTES} are read"),
    "another task's": Kind(instead(b'"task_id":"', b'"task_id":"x'), "names another task than the ad", LANES[:1]),
    "no subtask": Kind(lambda raw: raw, "neither a submission nor a subtask", ("sense",)),
    "without a spec": Kind(lambda raw: raw, "without a spec", ("match", "scale")),
    "without an award": Kind(lambda raw: raw, "without an award", ("execute",)),
}


def well(lane: str, task_id: str, now: float) -> bytes:
    """A valid message of the lane, with every field that a kind corrupts."""
    ad = TaskAd(task_id=task_id, description="count the words", timeout_s=55.5)
    hops = (Hop(phase="sense", instance="i", started=now, finished=now),)
    message = Submission(ad=ad, submission="s") if lane == "intake" else Envelope(ad=ad, deadline=now + 60, hops=hops)
    return encode(message).replace(b'"timeout_s"', b'"context":{},"timeout_s"')


def subject_of(bus: Bus, lane: str, task_id: str) -> str:
    return (
        bus.subjects.intake("public", "normal", task_id)
        if lane == "intake"
        else bus.subjects.task(lane, "normal", task_id)
    )


def phase_of(lane: str) -> str:
    return "sense" if lane == "intake" else lane


async def wait_for_letters(bus: Bus, count: int) -> dict[str, Letter]:
    """Return the dead letters by original subject, once `count` of them exist."""

    async def there() -> bool:
        return await messages(bus, "DEAD") >= count

    await until(there, within_s=WITHIN_S, what=f"{count} dead letters")
    found = await admin.list_letters(bus, 10 * count)
    assert len(found) == count
    return {one.facts.subject: one for one in found}


async def serves(bus: Bus) -> None:
    """A normal task goes through every phase."""
    handle = await task_client.publish(bus, TaskAd(description="count the words", domain="code"))
    assert await handle.content(WITHIN_S) == "done: count the words"


@pytest.fixture
async def cluster(nats_url: str, namespace: str) -> AsyncIterator[Bus]:
    """Six phases and a node; a client's connection."""
    async with (
        running_phases(nats_url, namespace=namespace),
        running_nodes(nats_url, lambda: [node("n", echo, code=0.9)], namespace=namespace),
        Bus(nats_url, namespace=namespace) as bus,
    ):
        await serves(bus)
        yield bus


async def test_every_kind_of_poison_message_is_dead_lettered_and_phases_continue(
    cluster: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are kept, the task of each message ends as `dead_letter`, and later tasks succeed."""
    sizes, real = list[int](), base._decoder
    monkeypatch.setattr(base, "_decoder", lambda shape: _Measured(real(shape), sizes))
    sent: dict[str, tuple[str, Kind, bytes]] = {}
    for number, kind in enumerate(KINDS.values()):
        for lane in kind.lanes:
            task_id = f"{lane}-{number}"
            sent[subject_of(cluster, lane, task_id)] = lane, kind, kind.spoil(well(lane, task_id, cluster.clock.now()))

    await asyncio.gather(*(cluster.jetstream.publish(subject, raw) for subject, (_, _, raw) in sent.items()))
    found = await wait_for_letters(cluster, len(sent))

    assert found.keys() == sent.keys()
    for subject, (lane, kind, raw) in sent.items():
        facts, body = found[subject].facts, found[subject].body
        assert re.search(kind.reason, facts.reason), (subject, facts.reason)
        assert (facts.phase, facts.deliveries, facts.cut) == (phase_of(lane), 1, len(raw) > MAX_MESSAGE_BYTES)
        assert body == raw[:MAX_MESSAGE_BYTES], subject
    assert 0 < max(sizes) <= MAX_MESSAGE_BYTES  # what is too large is never read
    await serves(cluster)
    await settled(cluster, 0, "INTAKE")
    await settled(cluster, 0, "TASKS")
    ids = [subject.rsplit(".", 1)[1] for subject, (lane, *_) in sent.items() if lane in {"intake", "sense"}]
    for task_id in ids:  # a client may wait for a task of this stream
        assert await end_of(cluster, task_id) == "dead_letter", task_id


class _Measured:
    """A decoder that records the sizes of its inputs."""

    def __init__(self, decoder: Any, sizes: list[int]) -> None:
        self._decoder, self._sizes = decoder, sizes

    def decode(self, raw: bytes) -> Any:
        self._sizes.append(len(raw))
        return self._decoder.decode(raw)


async def end_of(bus: Bus, task_id: str) -> str:
    """Return the code of the task's error, or its state."""

    async def ended() -> TaskRecord | None:
        entry = await records(bus).get(task_id)
        return entry.value if entry is not None and entry.value.ended else None

    record = await until(ended, within_s=WITHIN_S, what=f"{task_id} has ended")
    assert record is not None
    return record.envelope.error.code if record.envelope.error else record.state


async def test_an_envelope_that_evaluate_sends_back_without_a_spec_is_a_dead_letter_too(cluster: Bus) -> None:
    raw = well("evaluate", "evaluate", cluster.clock.now())
    envelope = decode(raw, Envelope)
    admitted = TaskRecord(task_id="evaluate", state="running", envelope=envelope, admitted_at=cluster.clock.now())
    await records(cluster).create("evaluate", admitted)
    await cluster.jetstream.publish(subject_of(cluster, "evaluate", "evaluate"), raw)
    assert await end_of(cluster, "evaluate") == "dead_letter"
    await settled(cluster, 0)
    assert await messages(cluster, "DEAD") == 1
    await serves(cluster)


HEADERS = (
    b"NATS/1.0\r\n\r\n",
    b"NATS/1.0 503\r\n\r\n",
    b"NATS/1.0 100 \xff\xfe\r\nStatus: 408\r\n\r\n",
    b"NATS/1.0\r\ntraceparent: \xff\xfe\x00\x1b[31m\r\nno colon\r\n: no name\r\n\xff: x\r\nStatus: 503\r\n\r\n",
    b"NATS/1.0\r\nLoom-Dead-reason: none\r\nNats-Pending-Messages: many\r\ntraceparent: %s\r\n\r\n" % (b"x" * 9999),
    b"no header block",
)


async def test_malformed_headers_and_subjects_do_not_reach_other_messages(cluster: Bus) -> None:
    lanes = {lane: subject_of(cluster, lane, "t").encode()[:-1] for lane in LANES}
    rubbish = [
        with_headers(b"%sheaders-%d" % (lane, n), block, b"{]")
        for lane in lanes.values()
        for n, block in enumerate(HEADERS)
    ]
    rubbish += [
        b"PUB %s%s 2\r\n{]\r\n" % (lane, token)
        for lane in lanes.values()
        for token in (b"\xff\xfe", "任务".encode(), b"a\x1b[31m", b"a" * 65)
    ]
    publish_raw(cluster.connection.url, *rubbish)
    good = [f"under-{n}" for n in range(len(HEADERS))]
    publish_raw(
        cluster.connection.url,
        *(
            with_headers(lanes["intake"] + task_id.encode(), block, well("intake", task_id, cluster.clock.now()))
            for task_id, block in zip(good, HEADERS, strict=True)
        ),
    )

    found = await wait_for_letters_by_phase(cluster, len(rubbish))

    each = len(rubbish) // len(LANES)
    assert found == {"sense": 2 * each, "match": each, "scale": each, "execute": each, "evaluate": each}
    assert {await end_of(cluster, task_id) for task_id in good} == {"succeeded"}
    await settled(cluster, 0, "INTAKE")
    await settled(cluster, 0, "TASKS")


async def wait_for_letters_by_phase(bus: Bus, count: int) -> Counter[str]:
    async def there() -> bool:
        return await messages(bus, "DEAD") == count

    await until(there, within_s=WITHIN_S, what=f"{count} dead letters")
    return Counter(one.facts.phase for one in await admin.list_letters(bus, 10 * count))


async def test_an_undecodable_hop_ends_the_task_and_its_client_gets_the_error(nats_url: str, namespace: str) -> None:
    over = asyncio.Event()

    async def hold(_job: RunRequest) -> str:
        await over.wait()
        return "too late"

    async with (
        running_phases(nats_url, namespace=namespace),
        running_nodes(nats_url, lambda: [node("n", hold, code=0.9)], namespace=namespace),
        Bus(nats_url, namespace=namespace) as bus,
    ):
        ads = {phase: TaskAd(task_id=phase, description="x", node_id="n") for phase in LANES[1:]}
        handles = {phase: await task_client.publish(bus, ad) for phase, ad in ads.items()}
        for phase in ads:
            await until(lambda phase=phase: _runs(bus, phase), within_s=WITHIN_S, what=f"{phase} runs")  # type: ignore[misc]
            await bus.jetstream.publish(subject_of(bus, phase, phase), b"{]")
        for phase, handle in handles.items():
            with pytest.raises(DeadLettered, match=f"^{phase} could not handle the task: undecodable: "):
                await handle.content(WITHIN_S)
        over.set()
        await settled(bus, 0)
        assert {await end_of(bus, phase) for phase in ads} == {"dead_letter"}


async def _runs(bus: Bus, task_id: str) -> bool:
    entry = await records(bus).get(task_id)
    return entry is not None and entry.value.claim.attempt > 0


@pytest.mark.slow
@pytest.mark.parametrize("crashing_phase", ["sense", "scale"])
async def test_a_task_that_kills_its_process_every_time_ends_and_its_neighbours_succeed(
    crashing_phase: Phase, nats_url: str, namespace: str, tmp_path: Path
) -> None:
    others = [phase for phase in PHASES if phase != crashing_phase]
    words = (sys.executable, "-m", "support.poison_process", nats_url, namespace, crashing_phase)
    env = {"PYTHONPATH": str(Path(__file__).parents[1])}
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running_phases(nats_url, names=others, namespace=namespace))
        nodes = [node("n", echo, code=0.9)]
        await stack.enter_async_context(running_nodes(nats_url, lambda: nodes, namespace=namespace))
        bus = await stack.enter_async_context(Bus(nats_url, namespace=namespace))
        before = [await task_client.publish(bus, _neighbour(n)) for n in range(3)]
        handle = await task_client.publish(
            bus, TaskAd(task_id="killer", description="x", context={MARK: True, **TO_SCALE})
        )
        behind = [await task_client.publish(bus, _neighbour(n)) for n in range(3, 6)]
        process = await stack.enter_async_context(command(tmp_path, *words, **env))
        meanwhile = list[TaskHandle]()
        while len(meanwhile) < 6:
            await until(lambda: process.out.count("died") > len(meanwhile), within_s=WITHIN_S, what="another death")
            meanwhile.append(await task_client.publish(bus, _neighbour(6 + len(meanwhile))))

        with pytest.raises(DeadLettered, match=f"{crashing_phase} could not handle the task: delivered 10 times"):
            await handle.content(2 * WITHIN_S)

        for neighbour in (*before, *behind, *meanwhile):
            assert await neighbour.content(WITHIN_S) == "done: count the words"
        (letter,) = await admin.list_letters(bus, 9)
        assert (letter.facts.phase, letter.facts.task_id, letter.facts.deliveries) == (
            crashing_phase,
            "killer",
            DEAD_AFTER + 1,
        )
        assert letter.facts.trail == ("" if crashing_phase == "sense" else "sense match")
        assert process.out.count("died") == DEAD_AFTER
        assert await end_of(bus, "killer") == "dead_letter"
        await settled(bus, 0)
        await process.end(signal.SIGTERM)


def _neighbour(number: int) -> TaskAd:
    return TaskAd(task_id=f"neighbour-{number}", description="count the words", domain="code", context=TO_SCALE)
