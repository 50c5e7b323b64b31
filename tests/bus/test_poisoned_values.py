"""Values that no honest process writes are left out, and the work on all others goes on."""

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import ad, awarded, envelope, reward
from support.bus_helpers import Connect
from support.fake_host import FakeHost, FakeRun
from support.logs import capture_logs
from support.phase_harness import Asker, Stage
from support.rewards import publish
from support.wait import until

from loom.bus.bus import Bus
from loom.bus.natsio.background_tasks import ServiceFailed
from loom.bus.natsio.transport.message import Msg
from loom.bus.records import records
from loom.bus.topology import stream_state
from loom.phases.adapt.lease import acquire_lease
from loom.phases.adapt.timings import AdaptTimings
from loom.runner.cli.entry import until_lost
from loom.schemas.auction import Bid
from loom.schemas.base import encode
from loom.schemas.envelope import Claim
from loom.schemas.errors import BusUnavailable
from loom.schemas.learning.calibration import BIAS, Calibration
from loom.schemas.learning.lease import Lease
from loom.schemas.learning.profile import DomainEvidence, NodeProfile, Score
from loom.schemas.notices import SubtaskEnded
from loom.schemas.task import RunResult, TaskError, TaskResult


async def profile(stage: Stage, node: str = "n1") -> NodeProfile | None:
    entry = (await stage.bus.bucket("nodes", NodeProfile).get(f"local.{node}")) if await readable(stage, node) else None
    return entry.value if entry else None


async def readable(stage: Stage, node: str) -> bool:
    try:
        await stage.bus.bucket("nodes", NodeProfile).get(f"local.{node}")
    except Exception:  # noqa: BLE001 - garbage that was put there
        return False
    return True


async def learned(stage: Stage, total: int, node: str = "n1") -> NodeProfile:
    async def known() -> NodeProfile | None:
        found = await profile(stage, node)
        return found if found and found.total_tasks == total else None

    found: Any = await until(known, what=f"{total} tasks of {node} are learned")
    return found  # type: ignore[no-any-return]


async def put_profile(stage: Stage, key: str, value: Any) -> None:
    """Store a value in the bucket of profiles, as any client with write permission can."""
    await stage.bus.jetstream.publish(f"$KV.{stage.bus.subjects.bucket('nodes')}.{key}", value)


def poisoned(n: int, field: bytes) -> bytes:
    """A reward with other JSON in place of its tokens, seconds and time."""
    return (
        b'{"reward_id":"p%d:1:rules","task_id":"p%d","attempt":1,"node_id":"n1","domain_token":"code","score":0.5,'
        b'"estimated":0.5,%s}' % (n, n, field if b"ended_at" in field else b'"ended_at":1,' + field)
    )


POISON = [
    b'"seconds":1e308',
    b'"seconds":1e999',
    b'"seconds":-1',
    b'"tokens":' + b"9" * 400,
    b'"tokens":' + str(2**53).encode(),
    b'"ended_at":1e300',
    b'"ended_at":9e10',
    b'"ended_at":-1',
    b'"signal":{"quality":1e308}',
    b'"x":' + b"[" * 2000,
]


# -- ADAPT


async def test_rewards_that_cannot_be_used_are_left_out_before_and_after_a_restart(stage: Stage) -> None:
    adapt = await stage.phase("adapt")
    subject = stage.bus.subjects.of("reward", "rules", "local", "n1", "code")
    for n, field in enumerate(POISON):
        for twice in range(2):
            await stage.bus.jetstream.publish(subject, poisoned(2 * n + twice, field))
    await publish(stage, reward(1), reward(2))
    stored = await learned(stage, 2)
    assert (stored.seconds, stored.tokens) == (1.0, 20)
    assert sum(adapt.bus.discards.counts.values()) == 2 * len(POISON)
    assert not adapt.bus.tasks.lost.is_set()
    await adapt.close()

    await stage.phase("adapt")
    await publish(stage, reward(3))
    assert (await learned(stage, 3)).domains["code"].count == 3


async def test_rewards_dated_ahead_do_not_keep_later_ones_out(stage: Stage) -> None:
    await stage.phase("adapt")
    now = stage.bus.clock.now()
    await publish(stage, *(replace(reward(n, score=0.9), ended_at=now + 3600 + n) for n in range(130)))
    await publish(stage, *(replace(reward(n, score=0.0), ended_at=now + 1) for n in range(200, 230)))
    stored = await learned(stage, 30)
    assert (stored.domains["code"].mean, stored.domains["code"].count) == (0.0, 30)


@pytest.mark.parametrize("ahead_s", [600, 3600, 1e9])
async def test_an_inheritance_dated_ahead_is_left_out_too(stage: Stage, ahead_s: float) -> None:
    adapt = await stage.phase("adapt")
    await publish(
        stage, replace(reward(1, kind="inherit", source="adapt"), ended_at=stage.bus.clock.now() + ahead_s), reward(2)
    )
    assert (await learned(stage, 1)).domains["code"].count == 1
    assert adapt.bus.discards.counts["reward_dated_ahead"] == 1


def forged(now: float) -> dict[str, Any]:
    """Replacements of a profile of n1, by key."""
    scores = (Score(attempt_id="x:1", score=0.0, ended_at=now),)
    evidence = DomainEvidence(scores=scores, count=1)
    ahead = replace(scores[0], ended_at=now + 1e6)
    return {
        "beyond the stream": NodeProfile(node_id="n1", last_seq=2**50, domains={"code": evidence}),
        "one beyond the stream": NodeProfile(node_id="n1", last_seq=4, domains={"code": evidence}),
        "beyond all integers": b'{"node_id":"n1","last_seq":%d}' % 2**60,
        "seconds of an old version": b'{"node_id":"n1","last_seq":3,"seconds":1.7e308}',
        "bytes": b"\xff garbage",
        "of another node": NodeProfile(node_id="n2", last_seq=2**50),
        "dated ahead": NodeProfile(node_id="n1", last_seq=3, domains={"code": DomainEvidence(scores=(ahead,))}),
        "closed to the present": NodeProfile(
            node_id="n1", last_seq=3, domains={"code": replace(evidence, since=now + 1e6)}
        ),
    }


@pytest.mark.parametrize("kind", forged(0.0))
async def test_an_implausible_stored_profile_is_rebuilt_at_a_start(stage: Stage, kind: str) -> None:
    await publish(stage, *(reward(n) for n in range(1, 4)))
    await put_profile(stage, "local.n1", forged(stage.bus.clock.now())[kind])
    await stage.phase("adapt")
    assert (await learned(stage, 3)).domains["code"].mean == 1.0
    await publish(stage, reward(4))
    assert (await learned(stage, 4)).last_seq == 4


@pytest.mark.parametrize("kind", [kind for kind in forged(0.0) if "dated" not in kind and "closed" not in kind])
async def test_an_implausible_stored_profile_is_overwritten_while_adapt_runs(stage: Stage, kind: str) -> None:
    await stage.phase("adapt")
    await publish(stage, *(reward(n) for n in range(1, 4)))
    await learned(stage, 3)
    await put_profile(stage, "local.n1", forged(stage.bus.clock.now())[kind])
    if kind == "seconds of an old version":
        await publish(stage, reward(4))
        assert (await learned(stage, 4)).last_seq == 4
    else:
        assert (await learned(stage, 3)).last_seq == 3


@pytest.mark.parametrize(
    "value", [b'{"domain_token":"code","last_seq":%d}' % 2**50, b"\xff", b'{"domain_token":"data","bias":1}']
)
async def test_an_implausible_calibration_is_learned_again_from_the_stream(stage: Stage, value: bytes) -> None:
    await stage.bus.jetstream.publish(f"$KV.{stage.bus.subjects.bucket('tuning')}.{BIAS}code", value)
    await stage.phase("adapt")
    await publish(stage, reward(1, estimated=0.5))
    bucket = stage.bus.bucket("tuning", Calibration)

    async def calibrated() -> bool:
        try:
            entry = await bucket.get(f"{BIAS}code")
        except Exception:  # noqa: BLE001 - the garbage is still there
            return False
        return entry is not None and (entry.value.domain_token, entry.value.count, entry.value.last_seq) == (
            "code",
            1,
            1,
        )

    await until(calibrated, what="the calibration is written over")


@pytest.mark.parametrize("until_s", [AdaptTimings.lease_s * 10, 3600, 9e10])
async def test_a_lease_longer_than_any_replica_takes_is_ignored(stage: Stage, until_s: float) -> None:
    await stage.bus.bucket("tuning", Lease).create(
        "x", Lease(holder="evil", until=min(9e10, stage.bus.clock.now() + until_s))
    )
    assert await acquire_lease(stage.bus, "x", AdaptTimings.lease_s)


async def test_a_lease_that_cannot_be_read_is_taken(stage: Stage) -> None:
    await stage.bus.jetstream.publish(f"$KV.{stage.bus.subjects.bucket('tuning')}.x", b"\xff")
    assert await acquire_lease(stage.bus, "x", AdaptTimings.lease_s)
    assert await acquire_lease(stage.bus, "x", AdaptTimings.lease_s)


# -- MATCH and EXECUTE


async def test_a_poisoned_bid_takes_neither_its_hosts_other_bids_nor_the_auction_with_it(stage: Stage) -> None:
    one = await FakeHost(await stage.connect("node"), "h1").start()
    two = await FakeHost(await stage.connect("node"), "h2", ("n2",)).start()
    good = encode(one.bids(Bid(node_id="n1", self_rating=0.9)))
    raw = good.replace(b'"bids":[', b'"bids":[{"node_id":"evil","self_rating":1.0,"free":%s},' % (b"9" * 400))
    one.offer = lambda _: raw  # type: ignore[assignment,return-value]
    await stage.phase("match")
    env = envelope(ad(), now=stage.bus.clock.now())
    await stage.put("match", env)
    award = (await stage.seen("task", phase="execute")).award
    assert (award.node_id, {bid.node_id for bid in award.bids}) == ("n1", {"n1", "n2"})
    assert two.calls


@pytest.mark.parametrize(
    "field", [b'"prompt_tokens":' + b"9" * 400, b'"duration_s":1e308', b'"steps":-1', b'"usd":"much"']
)
async def test_a_result_that_cannot_be_read_ends_the_attempt_at_once(stage: Stage, field: bytes) -> None:
    async def run(run: FakeRun) -> None:
        await run.publish("accepted")
        await run.bus.connection.publish(run.subject, b'{"seq":1,"kind":"result","result":{%s}}' % field)

    await FakeHost(await stage.connect("node"), run=run).start()
    await stage.phase("execute")
    env = awarded(envelope(ad(task_id="t1"), now=stage.bus.clock.now()))
    await stage.record(env)
    await stage.put("execute", env)
    ended = await stage.seen("task", phase="evaluate", within_s=5)
    assert (ended.error.code, ended.error.node_id) == ("agent_failed", "n1")


# -- EVALUATE


@pytest.mark.parametrize(
    "field", [b'"prompt_tokens":' + b"9" * 400, b'"duration_s":1e308', b'"tool_errors":' + b"9" * 20, b'"steps":1e308']
)
async def test_a_task_whose_result_is_out_of_bounds_ends_and_is_answered(stage: Stage, field: bytes) -> None:
    asker = Asker(stage.bus)
    await stage.phase("evaluate")
    env = awarded(envelope(ad(task_id="t1"), now=stage.bus.clock.now()))
    await stage.record(env, reply_to=(asker.inbox,), claim=Claim(attempt=1))
    raw = encode(replace(env, result=RunResult(content="x"))).replace(b'"content":"x"', b'"content":"x",' + field)
    await stage.bus.jetstream.publish(stage.bus.subjects.task("evaluate", "normal", "t1"), raw)
    assert (await asker.failure()).code == "dead_letter"
    await stage.settled()
    assert (await stage.read("t1")).state == "failed"


@pytest.mark.parametrize("readable_task", [True, False], ids=["the message is readable", "nothing is readable"])
@pytest.mark.parametrize(
    "garbage", [b"\xff garbage", b'{"task_id":"t1","state":"succeeded","envelope":7}', b"{}", b"null"]
)
async def test_a_task_whose_record_is_garbage_ends(stage: Stage, garbage: bytes, readable_task: bool) -> None:
    await stage.phase("evaluate")
    env = awarded(envelope(ad(task_id="t1"), now=stage.bus.clock.now(), result=RunResult(content="x")))
    await stage.bus.jetstream.publish(f"$KV.{stage.bus.subjects.bucket('records')}.t1", garbage)
    body: Any = env if readable_task else b"\xff"
    await stage.bus.jetstream.publish(stage.bus.subjects.task("evaluate", "normal", "t1"), body)
    result: TaskResult = await stage.seen("result", task_id="t1", within_s=10)
    assert (result.state, result.error.code if result.error else "") == ("failed", "dead_letter")
    await stage.settled()


async def test_the_readable_part_of_a_record_answers_its_submitter(stage: Stage) -> None:
    asker = Asker(stage.bus)
    await stage.phase("evaluate")
    env = awarded(envelope(ad(task_id="t1"), now=stage.bus.clock.now(), result=RunResult(content="x")))
    garbage = {"task_id": "t1", "state": "odd", "submission": "s", "reply_to": [asker.inbox], "envelope": 7}
    await stage.bus.jetstream.publish(f"$KV.{stage.bus.subjects.bucket('records')}.t1", garbage)
    await stage.put("evaluate", env)
    assert (await asker.failure()).code == "dead_letter"
    entry = await records(stage.bus).get("t1")
    assert entry is not None
    assert (entry.value.state, entry.value.submission) == ("failed", "s")


async def test_a_plan_that_is_garbage_keeps_no_task_from_its_end(stage: Stage) -> None:
    await stage.phase("evaluate")
    await stage.bus.jetstream.publish(f"$KV.{stage.bus.subjects.bucket('plans')}.t1", b"\xff")
    env = awarded(envelope(ad(task_id="t1"), now=stage.bus.clock.now()))
    await stage.record(env, claim=Claim(attempt=1))
    await stage.put("evaluate", env.failed(TaskError(code="invalid_task", message="x")))
    assert (await stage.seen("result", task_id="t1")).state == "failed"
    await stage.settled()


async def test_a_notice_about_a_plan_that_is_garbage_is_settled(stage: Stage) -> None:
    await stage.phase("scale")
    child = envelope(ad(task_id="c1"), now=stage.bus.clock.now())
    await stage.record(child, state="succeeded", ended_at=1.0)
    await stage.bus.jetstream.publish(f"$KV.{stage.bus.subjects.bucket('plans')}.t1", b"\xff")
    await stage.notify(SubtaskEnded(task_id="t1", child_id="c1", subtask="a"))
    await until(lambda: stage.all("dead", phase="scale"), within_s=5, what="the notice is a dead letter")
    await stage.settled()


# -- acknowledgements


@pytest.mark.parametrize(
    "forged_ack",
    [
        b"\xff",
        b"",
        b"7",
        b'{"stream":"x"',
        b"[" * 5000,
        b'{"seq":' + b"9" * 400 + b"}",
        b'{"error":{"err_code":1e308}}',
    ],
    ids=["bytes", "empty", "a number", "cut", "deep", "a huge number", "a float"],
)
async def test_a_forged_acknowledgement_is_asked_for_again(bus: Bus, forged_ack: bytes) -> None:
    storing = bus.jetstream.publish(bus.subjects.task("match", "normal", "t1"), b"{}", msg_id="t1")
    (stored,) = bus.jetstream._publisher._pending
    bus.requests._on_reply(Msg(stored.reply, data=forged_ack))
    ack = await storing
    assert ack.seq > 0
    assert bus.discards.counts["ack_undecodable"] == 1


def forge_next_answer(bus: Bus, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer the next request with `data` before the server can answer it."""
    opened = bus.requests.open_inbox

    def open_inbox(sink: Any) -> str:
        reply = opened(sink)
        asyncio.get_running_loop().call_soon(bus.requests._on_reply, Msg(reply, data=data))
        monkeypatch.setattr(bus.requests, "open_inbox", opened)
        return reply

    monkeypatch.setattr(bus.requests, "open_inbox", open_inbox)


@pytest.mark.parametrize("forged_answer", [b"\xff", b"7", b"[" * 5000, b'{"error":7}', b'{"state":7}', b'{"state":{}}'])
async def test_a_forged_answer_of_the_server_is_a_typed_error(
    bus: Bus, forged_answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge_next_answer(bus, forged_answer, monkeypatch)
    with pytest.raises(BusUnavailable, match="cannot be read"):
        await stream_state(bus, "TASKS")


@pytest.mark.parametrize("forged_answer", [b"\xff", b"7", b"[" * 5000, b'{"ts":1e308}'])
async def test_a_forged_time_of_the_server_is_ignored(
    bus: Bus, forged_answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge_next_answer(bus, forged_answer, monkeypatch)
    assert await bus._clock_sync._request_time(2.0) is None


# -- essential tasks


async def _fail() -> None:
    raise ValueError("poison")


async def test_an_essential_task_that_fails_ends_the_service_with_its_reason(connect: Connect) -> None:
    bus = await connect()
    with capture_logs() as logs:
        bus.tasks.spawn(_fail(), name="fold rewards", essential=True)
        with pytest.raises(ServiceFailed, match="fold rewards: ValueError: poison") as raised:
            await asyncio.wait_for(until_lost(bus), 5)
    assert raised.value.code == "service_failed"
    assert [(entry["event"], entry["task"]) for entry in logs] == [("essential_task_failed", "fold rewards")]


async def test_any_other_task_that_fails_ends_nothing(connect: Connect) -> None:
    bus = await connect()
    await asyncio.wait([bus.tasks.spawn(_fail(), name="one request")])
    await bus.requests.flush()
    assert not bus.tasks.lost.is_set()


async def test_a_cancelled_essential_task_ends_nothing(connect: Connect) -> None:
    bus = await connect()
    task = bus.tasks.spawn(asyncio.sleep(60), name="ticker", essential=True)
    task.cancel()
    await asyncio.wait([task])
    await bus.requests.flush()
    assert not bus.tasks.lost.is_set()


@pytest.mark.parametrize("phase", ["sense", "match", "scale", "execute", "evaluate", "adapt"])
async def test_every_phase_has_essential_tasks(stage: Stage, phase: Any) -> None:
    replica = await stage.phase(phase)
    own = {task.get_name() for task in replica.bus.tasks._essential} - {"bus-watch", "watch unconfirmed", "clock"}
    assert len(own) >= 3
    assert not any(name.startswith(("hop", "serve")) for name in own)
