"""A store or a process of another wire version is refused by one sentence, and nothing is changed."""

from typing import Any

import pytest
from support.bus_helpers import Connect
from support.logs import capture_logs

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.service_discovery import ServiceEndpoint, check_processes
from loom.bus.wire_version import WIRE, WireMismatch
from loom.runner.services import PhaseGroup
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import PHASES
from loom.schemas.errors import BusUnavailable

CONFIG = ClusterConfig()
NAMES = ("INTAKE", "TASKS", "REWARDS", "DEAD", "records", "plans", "nodes", "tuning")


def full_name(bus: Bus, name: str) -> str:
    return bus.subjects.stream(name) if name.isupper() else f"KV_{bus.subjects.bucket(name)}"


async def age(bus: Bus, name: str, metadata: dict[str, str]) -> None:
    """Give a stream or bucket other metadata."""
    stream = full_name(bus, name)
    config = (await bus.jetstream.api(f"STREAM.INFO.{stream}"))["config"]
    await bus.jetstream.api(f"STREAM.UPDATE.{stream}", {**config, "metadata": metadata})


async def test_every_stream_and_bucket_has_the_wire_version(bus: Bus) -> None:
    for name in NAMES:
        config = (await bus.jetstream.api(f"STREAM.INFO.{full_name(bus, name)}"))["config"]
        assert config["metadata"]["loom.wire"] == WIRE == "1"


@pytest.mark.parametrize("name", NAMES)
async def test_a_stream_without_a_wire_version_is_refused_and_nothing_is_created(bus: Bus, name: str) -> None:
    await age(bus, name, {})
    missing = full_name(bus, "tuning" if name != "tuning" else "plans")
    await bus.jetstream.api(f"STREAM.DELETE.{missing}")
    what = f"stream {bus.subjects.stream(name)}" if name.isupper() else f"bucket {bus.subjects.bucket(name)}"
    for create in (topology.apply, topology.init, topology.check_streams):
        with pytest.raises(WireMismatch) as refused:
            await create(bus, CONFIG)
        assert refused.value.message == (
            f"{what} has no wire version, not 1: finish its tasks with that version, then `loom init --reset`, "
            "or choose another LOOM_NAMESPACE"
        )
    assert [one["name"] for one in topology.streams(bus, CONFIG)].count(missing) == 1
    with pytest.raises(topology.Refused):
        await bus.jetstream.api(f"STREAM.INFO.{missing}")


async def test_another_wire_version_is_named(bus: Bus) -> None:
    await age(bus, "records", {"loom.wire": "2"})
    with pytest.raises(WireMismatch, match=f"bucket {bus.subjects.bucket('records')} has wire version 2, not 1: "):
        await topology.apply(bus, CONFIG)


@pytest.mark.parametrize("init", [True, False])
async def test_phases_do_not_start_on_a_store_of_another_version_however_patient(bus: Bus, init: bool) -> None:
    await age(bus, "TASKS", {"loom.wire": "0"})
    with pytest.raises(WireMismatch, match=f"stream {bus.subjects.stream('TASKS')} has wire version 0"):
        await PhaseGroup(bus, init=init).start(patience_s=60)


async def test_a_lost_bucket_is_not_created_next_to_streams_of_another_version(bus: Bus) -> None:
    await bus.jetstream.api(f"STREAM.DELETE.{full_name(bus, 'plans')}")
    await age(bus, "DEAD", {"loom.wire": "2"})
    with pytest.raises(WireMismatch):
        await topology.init(bus, CONFIG)


# -- processes


async def present(bus: Bus, metadata: dict[str, str], *names: str) -> ServiceEndpoint:
    presence = ServiceEndpoint(bus, names or ["match"], "i1", {"host": "somewhere", **metadata})
    await presence.start()
    return presence


@pytest.mark.parametrize(("version", "expected"), [("2", "wire version 2"), ("", "no wire version")])
async def test_a_running_process_of_another_version_is_refused(
    plain: Bus, connect: Connect, version: str, expected: str
) -> None:
    await present(await connect(role="match"), {"loom.wire": version})
    name = f"{plain.subjects.namespace}-match"
    with pytest.raises(WireMismatch) as refused:
        await check_processes(plain)
    assert refused.value.message == (
        f"process {name} (i1) on somewhere has {expected}, not 1: stop it and the others of its version, "
        "or choose another LOOM_NAMESPACE"
    )
    phases = await connect(role="phases")
    with pytest.raises(WireMismatch, match="process"):
        await PhaseGroup(phases).start(patience_s=60)
    assert await topology.missing_streams(plain, CONFIG) == list(topology.streams(plain, CONFIG))


async def test_processes_of_the_same_version_and_of_other_namespaces_do_not_prevent_a_start(
    plain: Bus, connect: Connect
) -> None:
    await present(await connect(role="phases"), {}, *PHASES)
    other = await connect(namespace=f"{plain.subjects.namespace}-2")
    await present(other, {"loom.wire": "2"})
    await check_processes(plain)


# -- permissions to create streams


@pytest.mark.slow
async def test_phases_that_may_not_create_streams_name_the_command_that_does(plain: Bus) -> None:
    group = PhaseGroup(plain, ["match"], init=False)
    first = plain.subjects.stream("INTAKE")
    with pytest.raises(BusUnavailable, match=f"{first} and 7 more are missing on .*: run `loom init`"):
        await group.start()
    with capture_logs() as logs, pytest.raises(BusUnavailable):
        await group.start(patience_s=0.1)
    assert [entry["reason"] for entry in logs if entry["event"] == "start_waits"]


async def test_such_phases_create_the_consumers_of_their_own_alone(bus: Bus) -> None:
    stream = bus.subjects.stream("TASKS")
    for lane in topology.TASK_LANES:
        await bus.jetstream.api(f"CONSUMER.DELETE.{stream}.{lane.name}")
    group = PhaseGroup(bus, ["match"], init=False)
    await group._lay_out()
    stored = (await bus.jetstream.api(f"CONSUMER.NAMES.{stream}"))["consumers"]
    assert set(stored) == {lane.name for lane in topology.MATCH_LANES}


async def test_the_lanes_of_the_phases_are_all_lanes() -> None:
    lanes = [lane for phase in PHASES for lane in topology.PHASE_LANES[phase]]
    assert sorted(lanes) == sorted(topology.LANES)


async def test_a_delete_leaves_nothing_of_the_namespace_and_all_of_others(bus: Bus, connect: Connect) -> None:
    other = await connect(namespace=f"{bus.subjects.namespace}_2")
    await topology.apply(other, CONFIG)
    await age(bus, "TASKS", {})
    deleted: list[Any] = await topology.delete(bus, CONFIG)
    assert deleted == [full_name(bus, name) for name in NAMES]
    assert await topology.delete(bus, CONFIG) == []
    assert await topology.missing_streams(other, CONFIG) == []
