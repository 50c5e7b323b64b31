"""`loom init`: its created and deleted streams, and its refusals; the refusals of `loom up` and `loom phase run`."""

import asyncio
import signal
from pathlib import Path

import pytest
from support.command import LOOM, Ended, command
from support.command import loom as run
from support.in_process import Loom, is_refused
from support.services import running_phases
from support.wait import until

from loom import Runtime
from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.service_discovery import ServiceEndpoint
from loom.bus.wire_version import WireMismatch
from loom.runner.server.nats_server import embedded_server
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import PHASES

Where = tuple[str, str]
CONFIG = ClusterConfig()
NO_VERSION = "has no wire version, not 1: finish its tasks with that version, then `loom init --reset"


async def make_old(bus: Bus) -> str:
    """Create a stream as versions before wire versions did; returns its name."""
    old = next(iter(topology.streams(bus, CONFIG)))
    await bus.jetstream.api(f"STREAM.CREATE.{old['name']}", {**old, "metadata": {}})
    return str(old["name"])


async def in_thread(loom: Loom, line: str) -> Ended:
    return Ended(*await asyncio.to_thread(loom, line))


async def test_init_creates_everything_once_and_prints_it(loom: Loom, client: Bus) -> None:
    first = await in_thread(loom, "init")
    names = [str(one["name"]) for one in topology.streams(client, CONFIG)]
    made = [*names, *(lane.name for lane in topology.LANES)]
    assert first.code == 0
    assert first.out.splitlines()[:-1] == [f"created  {name}" for name in made]
    summary = f"namespace {client.subjects.namespace} has its streams, 4 buckets and 12 consumers, wire version 1"
    assert first.out.splitlines()[-1] == summary

    again = await in_thread(loom, "init")
    assert (again.code, again.out, again.err) == (0, f"{summary}\n", "")


async def test_a_differing_setting_is_printed_and_not_changed(
    loom: Loom, client: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await topology.apply(client, CONFIG)
    monkeypatch.setenv("LOOM_INTAKE_LIMIT", "7")
    ended = await in_thread(loom, "init")
    stream = client.subjects.stream("INTAKE")
    assert ended.out.splitlines()[0] == f"differs  {stream}: max_msgs is 100000, designed 7"


async def test_streams_of_another_version_are_refused_until_they_are_reset(loom: Loom, client: Bus) -> None:
    stream = await make_old(client)
    refused = await in_thread(loom, "init")
    assert (refused.code, refused.out) == (3, "")
    assert refused.err.startswith(f"wire_mismatch: stream {stream} {NO_VERSION}")
    assert refused.err.count("\n") == 1

    ended = await in_thread(loom, "init --reset --yes")
    assert ended.code == 0
    assert ended.out.splitlines()[:2] == [f"deleted  {stream}", f"created  {stream}"]
    assert (await in_thread(loom, "init")).code == 0


def test_a_reset_without_a_terminal_needs_confirmation(loom: Loom, on_bus: Where) -> None:
    is_refused(loom, "init --reset", 2, "bad_usage: Invalid value for --reset: deletes all tasks")


async def test_a_running_process_of_another_version_keeps_it_from_the_streams(
    loom: Loom, client: Bus, on_bus: Where
) -> None:
    await topology.apply(client, CONFIG)
    async with Bus(on_bus[0], namespace=on_bus[1], role="match") as other:
        presence = ServiceEndpoint(other, ["match"], "i1", {"loom.wire": "2"})
        await presence.start()
        for line in ("init", "init --reset --yes"):
            ended = await in_thread(loom, line)
            assert (ended.code, ended.out) == (3, "")
            assert ended.err.startswith(f"wire_mismatch: process {on_bus[1]}-match (i1) on ")
        await presence.stop()
    assert await topology.missing_streams(client, CONFIG) == []


async def test_a_runtime_names_the_process_of_another_version(on_bus: Where) -> None:
    """Without one of the phases: the replies of all six end the check, and may come first."""
    url, namespace = on_bus
    async with (
        running_phases(url, namespace=namespace, names=PHASES[:-1]),
        Bus(url, namespace=namespace, role="node") as other,
    ):
        await ServiceEndpoint(other, ["match"], "i1", {"loom.wire": "2"}).start()
        await other.requests.flush()
        with pytest.raises(WireMismatch, match="process"):
            async with Runtime():
                pass


@pytest.mark.slow
async def test_services_end_with_one_line_on_a_store_of_another_version(
    client: Bus, on_bus: Where, tmp_path: Path
) -> None:
    stream = await make_old(client)
    where = {"NATS_URL": on_bus[0], "LOOM_NAMESPACE": on_bus[1]}
    for words in (("up",), ("up", "--processes"), ("phase", "run", "match")):
        ended = await run(tmp_path, *words, **where)
        assert ended.code == 3, words
        lines = [line for line in ended.err.splitlines() if "wire_mismatch" in line]
        assert lines == [f"wire_mismatch: stream {stream} {NO_VERSION}`, or choose another LOOM_NAMESPACE"]


@pytest.mark.slow
async def test_the_store_of_a_program_is_reset_by_its_folder(
    loom: Loom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NATS_URL", raising=False)
    monkeypatch.delenv("LOOM_NAMESPACE", raising=False)
    store = tmp_path / "the store"
    async with embedded_server(store) as server, Bus(server.url) as bus:
        await make_old(bus)
    with pytest.raises(WireMismatch, match=f"`loom init --reset --store '{store}'`"):
        await Runtime(store=store).__aenter__()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(store)
    ended = await in_thread(loom, "init --reset --yes --store link")
    assert ended.code == 0, ended.err
    async with Runtime(store=store):
        pass


@pytest.mark.slow
async def test_a_phase_begins_once_the_streams_are_created(on_bus: Where, client: Bus, tmp_path: Path) -> None:
    where = {"NATS_URL": on_bus[0], "LOOM_NAMESPACE": on_bus[1]}
    async with command(tmp_path, *LOOM, "phase", "run", "scale", **where) as phase:
        await phase.wait_for_output("run `loom init`")
        await topology.apply(client, CONFIG)
        await until(lambda: "ready" in phase.err, what="the phase works")
        assert (await phase.end(signal.SIGTERM)).code == 0
