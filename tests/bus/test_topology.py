"""Streams, buckets and consumers: created once, by the process that comes first, and never changed without a report."""

import asyncio
import sys
from typing import Any

import pytest
from support.bus_helpers import Connect, envelope
from support.logs import capture_logs

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.natsio.connection import Connection
from loom.bus.natsio.server_errors import Refused
from loom.runner.doctor.diagnosis import design
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import PHASES
from loom.schemas.errors import BusUnavailable
from loom.schemas.task import PRIORITIES

DAY_NS = 86_400 * 10**9


async def config_of(bus: Bus, stream: str) -> dict[str, Any]:
    config: dict[str, Any] = (await bus.jetstream.api(f"STREAM.INFO.{stream}"))["config"]
    return config


async def names(bus: Bus) -> set[str]:
    """The namespace's streams."""
    ns, found, total = bus.subjects.namespace, set[str](), 1
    while len(found) < total:  # the server lists so many at a time
        page = await bus.jetstream.api("STREAM.NAMES", {"offset": len(found)})
        found |= set(page["streams"] or [])
        total = page["total"] if page["streams"] else 0
    return {name for name in found if name.startswith((f"{ns.upper()}_", f"KV_{ns}_"))}


async def consumers(bus: Bus, stream: str) -> set[str]:
    return set((await bus.jetstream.api(f"CONSUMER.NAMES.{bus.subjects.stream(stream)}"))["consumers"] or [])


async def test_all_streams_buckets_and_consumers_exist_after_the_first_apply(plain: Bus) -> None:
    assert await names(plain) == set()
    assert await topology.apply(plain, ClusterConfig()) == []
    s = plain.subjects
    assert await names(plain) == {s.stream(name) for name in ("INTAKE", "TASKS", "REWARDS", "DEAD")} | {
        f"KV_{s.bucket(name)}" for name in ("records", "plans", "nodes", "tuning")
    }
    assert await consumers(plain, "INTAKE") == {f"intake_{priority}" for priority in PRIORITIES}
    assert await consumers(plain, "TASKS") == {
        *("sense", "scale", "execute", "evaluate"),
        *(f"match_{priority}" for priority in PRIORITIES),
    }


async def test_a_second_apply_changes_nothing_and_reports_nothing(bus: Bus) -> None:
    async def everything() -> list[Any]:
        found = [await bus.jetstream.api(f"STREAM.INFO.{name}") for name in sorted(await names(bus))]
        found += [
            await bus.jetstream.api(f"CONSUMER.INFO.{bus.subjects.stream(lane.stream)}.{lane.name}")
            for lane in topology.LANES
        ]
        return [(one["config"], one["created"]) for one in found]

    before = await everything()
    with capture_logs() as logs:
        assert await topology.apply(bus, ClusterConfig()) == []
    assert await everything() == before
    assert not [entry for entry in logs if entry["event"] == "topology_differs"]


async def test_the_streams_are_as_designed(bus: Bus) -> None:
    s = bus.subjects
    intake = await config_of(bus, s.stream("INTAKE"))
    assert (intake["retention"], intake["discard"], intake["max_msgs"]) == ("workqueue", "new", 100_000)
    tasks = await config_of(bus, s.stream("TASKS"))
    assert (tasks["retention"], tasks["discard"], tasks["allow_msg_schedules"]) == ("workqueue", "old", True)
    assert (tasks["max_msgs"], tasks["max_bytes"], tasks["max_age"]) == (-1, -1, 0)
    dead = await config_of(bus, s.stream("DEAD"))
    assert (dead["retention"], dead["max_age"]) == ("limits", 30 * DAY_NS)
    assert (await config_of(bus, s.stream("REWARDS")))["max_bytes"] > 0
    for bucket, days in (("records", 3), ("plans", 3), ("nodes", 0), ("tuning", 0)):
        kv = await config_of(bus, f"KV_{s.bucket(bucket)}")
        assert (kv["max_msgs_per_subject"], kv["max_age"]) == (1, days * DAY_NS)


async def test_a_lane_waits_thirty_seconds_and_delivers_without_end(bus: Bus) -> None:
    for lane in topology.LANES:
        config = (await bus.jetstream.api(f"CONSUMER.INFO.{bus.subjects.stream(lane.stream)}.{lane.name}"))["config"]
        assert (config["ack_policy"], config["ack_wait"], config["max_deliver"]) == ("explicit", 30 * 10**9, -1)
        assert config["max_ack_pending"] == -1
        assert "backoff" not in config  # a backoff list would override the 30 seconds


async def test_every_phase_has_a_lane_for_every_priority(bus: Bus) -> None:
    for phase in PHASES[:-1]:  # ADAPT reads rewards
        for priority in PRIORITIES:
            subject = bus.subjects.task(phase, priority, "t1")
            await bus.jetstream.publish(subject, envelope())
    waiting = 0
    for name in await consumers(bus, "TASKS"):
        waiting += (await bus.jetstream.api(f"CONSUMER.INFO.{bus.subjects.stream('TASKS')}.{name}"))["num_pending"]
    assert waiting == 5 * len(PRIORITIES)


async def test_a_stream_that_differs_is_left_alone_and_reported_in_a_sentence(plain: Bus) -> None:
    wanted = next(one for one in topology.streams(plain, ClusterConfig()) if one["name"].endswith("_REWARDS"))
    await plain.jetstream.api(f"STREAM.CREATE.{wanted['name']}", {**wanted, "max_bytes": 4096, "storage": "memory"})

    with capture_logs() as logs:
        differences = await topology.apply(plain, ClusterConfig())

    assert differences == [
        f"{wanted['name']}: storage is 'memory', designed 'file'",
        f"{wanted['name']}: max_bytes is 4096, designed {wanted['max_bytes']}",
    ]
    assert [entry["difference"] for entry in logs if entry["event"] == "topology_differs"] == differences
    assert (await config_of(plain, wanted["name"]))["max_bytes"] == 4096
    assert len(await names(plain)) == 8


async def test_a_setting_that_changed_since_is_reported_too(bus: Bus) -> None:
    differences = await topology.apply(bus, ClusterConfig(intake_limit=7))
    assert differences == [f"{bus.subjects.stream('INTAKE')}: max_msgs is 100000, designed 7"]


# -- rollup headers, by which one message erases others

STREAMS = ("INTAKE", "REWARDS", "DEAD", "records", "plans", "nodes", "tuning")


def full_name(bus: Bus, name: str) -> str:
    return bus.subjects.stream(name) if name.isupper() else f"KV_{bus.subjects.bucket(name)}"


def subject_in(bus: Bus, name: str, key: str) -> str:
    """A subject of that stream or bucket."""
    subjects = {
        "INTAKE": bus.subjects.intake("public", "low", key),
        "REWARDS": bus.subjects.of("reward", "rules", "local", key, "code"),
        "DEAD": bus.subjects.of("dead", "match", key),
    }
    return subjects.get(name, f"$KV.{bus.subjects.bucket(name)}.{key}")


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("scope", ["all", "sub"])
async def test_no_message_erases_others_by_a_rollup_header(bus: Bus, name: str, scope: str) -> None:
    for n in range(3):
        await bus.jetstream.publish(subject_in(bus, name, f"k{n}"), b"{}")
    with pytest.raises(Refused, match="rollup not permitted"):
        await bus.jetstream.publish(subject_in(bus, name, "k1"), b"{}", headers={"Nats-Rollup": scope})
    assert (await bus.jetstream.api(f"STREAM.INFO.{full_name(bus, name)}"))["state"]["messages"] == 3


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_of_before_that_allows_rollup_headers_is_changed_in_place(plain: Bus, name: str) -> None:
    stream = full_name(plain, name)
    wanted = next(one for one in topology.streams(plain, ClusterConfig()) if one["name"] == stream)
    await plain.jetstream.api(f"STREAM.CREATE.{stream}", {**wanted, "allow_rollup_hdrs": True})
    await plain.jetstream.publish(subject_in(plain, name, "k1"), b"{}")
    seen = await topology.inspect(plain, ClusterConfig())
    assert [(finding.mark, finding.message) for finding in design(seen, "x") if stream in finding.message] == [
        ("warn", f"{stream}: allow_rollup_hdrs is True, designed False")
    ]

    assert await topology.apply(plain, ClusterConfig()) == []
    assert (await config_of(plain, stream))["allow_rollup_hdrs"] is False
    assert (await plain.jetstream.api(f"STREAM.INFO.{stream}"))["state"]["messages"] == 1


async def test_a_stream_whose_change_the_server_refuses_is_reported(
    plain: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = full_name(plain, "records")
    wanted = next(one for one in topology.streams(plain, ClusterConfig()) if one["name"] == stream)
    await plain.jetstream.api(f"STREAM.CREATE.{stream}", {**wanted, "allow_rollup_hdrs": True})
    api = plain.jetstream.api

    async def refuse(call: str, body: Any = None, **options: Any) -> Any:
        if call.startswith("STREAM.UPDATE."):
            raise Refused("not permitted", 10000)
        return await api(call, body, **options)

    monkeypatch.setattr(plain.jetstream, "api", refuse)
    assert await topology.apply(plain, ClusterConfig()) == [f"{stream}: allow_rollup_hdrs is True, designed False"]


async def test_only_the_stream_with_schedules_allows_rollup_headers_as_the_server_demands(bus: Bus) -> None:
    allowed = [name for name in sorted(await names(bus)) if (await config_of(bus, name))["allow_rollup_hdrs"]]
    assert allowed == [bus.subjects.stream("TASKS")]
    config = {**(await config_of(bus, allowed[0])), "name": "pedantic", "subjects": ["pedantic.>"]}
    with pytest.raises(Refused, match="scheduling cannot be set if roll-ups are disabled"):
        await bus.jetstream.api("STREAM.CREATE.pedantic", {**config, "allow_rollup_hdrs": False, "pedantic": True})


# -- missing streams and consumers


async def test_missing_streams_are_restored_and_the_others_left_as_they_are(bus: Bus) -> None:
    stream = bus.subjects.stream("TASKS")
    edited = {**topology.consumer(bus, topology.SCALE_LANE), "ack_wait": 5 * 10**9}
    call = f"CONSUMER.CREATE.{stream}.scale.{edited['filter_subject']}"
    await bus.jetstream.api(call, {"stream_name": stream, "config": edited})
    assert await topology.init(bus, ClusterConfig(intake_limit=7)) == []

    await bus.jetstream.api(f"STREAM.DELETE.{full_name(bus, 'plans')}")
    await bus.jetstream.api(f"CONSUMER.DELETE.{stream}.match_low")
    assert await topology.init(bus, ClusterConfig(intake_limit=7)) == [full_name(bus, "plans"), "match_low"]
    assert (await bus.jetstream.api(f"CONSUMER.INFO.{stream}.scale"))["config"]["ack_wait"] == 5 * 10**9
    assert (await config_of(bus, bus.subjects.stream("INTAKE")))["max_msgs"] == 100_000


async def test_two_namespaces_live_on_one_server(bus: Bus, connect: Connect) -> None:
    other = await connect(namespace=f"{bus.subjects.namespace}-2")
    assert await topology.apply(other, ClusterConfig()) == []
    await bus.jetstream.publish(bus.subjects.task("match", "low", "t1"), envelope())
    assert (await topology.stream_state(bus, "TASKS"))["messages"] == 1
    assert (await topology.stream_state(other, "TASKS"))["messages"] == 0


async def test_many_may_apply_at_once(connect: Connect) -> None:
    buses = [await connect() for _ in range(8)]
    assert await asyncio.gather(*(topology.apply(bus, ClusterConfig()) for bus in buses)) == [[]] * 8
    assert len(await names(buses[0])) == 8


@pytest.mark.slow
async def test_many_processes_may_apply_at_once(nats_url: str, namespace: str, plain: Bus) -> None:
    script = (
        "import asyncio; from loom.bus import topology; from loom.bus.bus import Bus\n"
        "from loom.schemas.config import ClusterConfig\n"
        "async def main():\n"
        f"    async with Bus({nats_url!r}, namespace={namespace!r}) as bus:\n"
        "        assert await topology.apply(bus, ClusterConfig()) == []\n"
        "asyncio.run(main())\n"
    )
    started = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", script, stderr=asyncio.subprocess.PIPE)
        for _ in range(3)
    ]
    errors = [(await one.communicate())[1].decode() for one in started]
    assert [one.returncode for one in started] == [0] * 3, errors
    assert len(await names(plain)) == 8


async def test_an_old_server_is_refused_by_its_version(plain: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "server_version", (2, 11, 9))
    with pytest.raises(BusUnavailable, match=r"nats-server 2\.11\.9 is too old; loom needs 2\.12"):
        await topology.apply(plain, ClusterConfig())
    assert await names(plain) == set()


@pytest.mark.parametrize("version", [(2, 12, 0), (2, 15, 1), (3, 0, 0)])
async def test_a_recent_server_is_taken(plain: Bus, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...]) -> None:
    assert plain.connection.server_version >= (2, 12)
    monkeypatch.setattr(Connection, "server_version", version)
    assert await topology.apply(plain, ClusterConfig()) == []


async def test_a_stream_the_server_refuses_is_reported(plain: Bus) -> None:
    with pytest.raises(BusUnavailable, match=r"cannot create stream \w+_INTAKE: .*; 3 replicas .* lower LOOM_REPLICAS"):
        await topology.apply(plain, ClusterConfig(replicas=3))  # there is one server only


async def test_a_foreign_stream_in_the_way_is_reported(plain: Bus) -> None:
    ns = plain.subjects.namespace
    await plain.jetstream.api(f"STREAM.CREATE.{ns}-foreign", {"name": f"{ns}-foreign", "subjects": [f"{ns}.task.>"]})
    with pytest.raises(BusUnavailable, match=r"TASKS.*overlap"):
        await topology.apply(plain, ClusterConfig())


async def test_a_lane_is_restored_where_it_is_missing(bus: Bus) -> None:
    stream = bus.subjects.stream("TASKS")
    await bus.jetstream.api(f"CONSUMER.DELETE.{stream}.execute")
    await topology.ensure_consumer(bus, topology.EXECUTE_LANE)
    await topology.ensure_consumer(bus, topology.EXECUTE_LANE)
    assert "execute" in await consumers(bus, "TASKS")


async def test_the_state_of_a_stream_counts_by_subject_where_asked(bus: Bus) -> None:
    for n in range(3):
        await bus.jetstream.publish(bus.subjects.task("match", "low", f"t{n}"), envelope())
    state = await topology.stream_state(bus, "TASKS", subjects=bus.subjects.task("match", "*", "t1"))
    assert state["messages"] == 3
    assert state["subjects"] == {bus.subjects.task("match", "low", "t1"): 1}
    with pytest.raises(Refused):
        await topology.stream_state(bus, "NONE")
