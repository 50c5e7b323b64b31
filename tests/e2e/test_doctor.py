"""`loom doctor`: its findings, its advice, and its exit codes."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from support.builders import ad, envelope, reward
from support.command import command, loom
from support.services import running_phases
from support.wait import until

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.host_directory import AnnouncedHost
from loom.bus.rewards import RewardBus
from loom.bus.service_discovery import (
    Clocks,
    ServiceEndpoint,
    ServiceInstance,
    clocks,
    discover,
    settings_facts,
    shared_settings,
)
from loom.bus.topology import Inspection, Part
from loom.phases.adapt import Adapt
from loom.phases.scale import Scale
from loom.runner.doctor.diagnosis import backlog, clock, examine, examine_here, node_hosts, phases, process_clocks
from loom.runner.doctor.findings import Finding
from loom.runner.server.nats_server import find_server
from loom.runner.services import PhaseGroup, running_nodes
from loom.schemas.auction import AnnouncedNode
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import PHASES
from loom.types import AgentNode, CapabilityProfile

Where = tuple[str, str]


def nodes() -> list[AgentNode]:
    return [AgentNode(id="n", agent=str.upper, capabilities=CapabilityProfile())]


def troubles(findings: list[Finding]) -> dict[str, str]:
    """Return the findings that are not ok, by subject; each has advice."""
    wrong = [finding for finding in findings if finding.mark != "ok"]
    assert all(finding.todo for finding in wrong)
    assert not any(finding.todo for finding in findings if finding.mark == "ok")
    return {finding.about: f"{finding.mark}: {finding.message}" for finding in wrong}


@pytest.mark.slow
async def test_a_healthy_cluster_has_only_good_findings(on_bus: Where, client: Bus, tmp_path: Path) -> None:
    url, namespace = on_bus
    where = {"NATS_URL": url, "LOOM_NAMESPACE": namespace}
    async with running_phases(url, namespace=namespace), running_nodes(url, nodes, namespace=namespace):
        assert troubles(await examine(client, ClusterConfig())) == {}
        assert troubles(await examine_here(client)) == {}
        remote, here = await asyncio.gather(
            loom(tmp_path, "doctor", "--json", **where), loom(tmp_path, "doctor", "--here", **where)
        )

    assert (remote.code, remote.err, here.code) == (0, "", 0)
    seen = [msgspec.convert(json.loads(line), Finding) for line in remote.out.splitlines()]
    assert [finding.about for finding in seen] == [
        *("server", "jetstream", "clock", "streams", "storage"),
        *(f"phase {phase}" for phase in PHASES),
        *("settings", "work"),
        *("hosts", "backlog", "dead letters"),
    ]
    assert f"{namespace}-match" in here.out
    assert f"{namespace}-node" in here.out


@pytest.mark.slow
async def test_each_problem_is_a_line_with_advice(on_bus: Where, client: Bus, tmp_path: Path) -> None:
    url, namespace = on_bus
    s = client.subjects
    async with running_phases(url, names=("sense", "match"), namespace=namespace):
        dead = (await client.jetstream.api(f"STREAM.INFO.{s.stream('DEAD')}"))["config"]
        await client.jetstream.api(f"STREAM.UPDATE.{s.stream('DEAD')}", {**dead, "max_age": 10**12})
        await client.jetstream.api(f"CONSUMER.DELETE.{s.stream('TASKS')}.execute")
        await client.jetstream.publish(s.of("dead", "match", "t1"), b"?")
        found = troubles(await examine(client, ClusterConfig(intake_limit=7)))
        ended = await loom(tmp_path, "doctor", NATS_URL=url, LOOM_NAMESPACE=namespace, COLUMNS="80")

    assert found == {
        "streams": f"warn: {s.stream('DEAD')}: max_age is 1000000000000, designed 2592000000000000",
        **{f"phase {phase}": "fail: does not answer" for phase in ("scale", "execute", "evaluate", "adapt")},
        "hosts": "warn: no node is there to bid",
        "dead letters": "warn: 1 wait",
    }
    assert ended.code == 1
    lines = ended.out.splitlines()
    assert all(re.match(r"(ok  |warn|fail) \S", line) for line in lines)
    assert any(line.startswith("fail streams        execute is missing → any running phase creates") for line in lines)
    assert 'fail phase scale    does not answer → run "loom phase run scale", or see its log' in lines


@pytest.mark.slow
async def test_a_setting_that_differs_between_phases_is_named_with_its_values(on_bus: Where, client: Bus) -> None:
    url, namespace = on_bus
    other = ClusterConfig(max_attempts=5, judge_weights={"judge": 2}, drain_timeout_s=1)
    async with (
        running_phases(url, names=("sense", "match"), namespace=namespace),
        running_phases(url, names=("execute",), namespace=namespace, config=other),
    ):
        shared = await shared_settings(client)
        found = [finding for finding in await examine(client, ClusterConfig()) if finding.about == "settings"]

    ids = {each.process.split(" ")[0].removeprefix(f"{namespace}-"): each.process for each in shared}
    both = f"{ids['match']} {ids['sense']}"
    assert [(finding.mark, finding.message, finding.todo) for finding in found] == [
        (
            "warn",
            f'judge_weights is {{"judge":2.0}} in {ids["execute"]}, {{}} in {both}',
            "give all processes the same LOOM_JUDGE_WEIGHTS and start them again",
        ),
        (
            "warn",
            f"max_attempts is 3 in {both}, 5 in {ids['execute']}",
            "give all processes the same LOOM_MAX_ATTEMPTS and start them again",
        ),
    ]


def test_numbers_of_another_form_are_the_same_setting() -> None:
    assert settings_facts(ClusterConfig(idle_timeout_s=300)) == settings_facts(ClusterConfig(idle_timeout_s=300.0))
    assert settings_facts(ClusterConfig(learn_wait_s=1)) == settings_facts(ClusterConfig(drain_timeout_s=1))


@pytest.mark.slow
async def test_another_wire_version_is_found_in_streams_and_processes(on_bus: Where, client: Bus) -> None:
    await topology.apply(client, ClusterConfig())
    stream = client.subjects.stream("DEAD")
    config = (await client.jetstream.api(f"STREAM.INFO.{stream}"))["config"]
    await client.jetstream.api(f"STREAM.UPDATE.{stream}", {**config, "metadata": {}})
    async with Bus(on_bus[0], namespace=on_bus[1], role="match") as other:
        presence = ServiceEndpoint(other, ["match"], "i1", {"loom.wire": "2"})
        await presence.start()
        found = [finding for finding in await examine(client, ClusterConfig()) if finding.about == "wire"]
        await presence.stop()

    assert [(finding.mark, finding.message) for finding in found] == [
        ("fail", f"{stream} has no wire version, this is 1"),
        ("fail", f"{on_bus[1]}-match (i1) has wire version 2, this is 1"),
    ]


@pytest.mark.slow
async def test_an_empty_server_is_reported_as_never_used(client: Bus) -> None:
    found = troubles(await examine(client, ClusterConfig()))

    assert found["streams"] == f"fail: none in namespace {client.subjects.namespace}"
    assert {"phase sense", "hosts"} <= found.keys()
    assert troubles(await examine_here(client)).keys() == {"here"}


def test_replicas_of_other_versions_and_strange_clocks_are_noticed() -> None:
    assert clock(0.4).mark == "ok"
    assert clock(-3.0).message == "3.00 s ahead of the server's"
    assert clock(3.0).mark == "warn"
    found = troubles(list(phases([_present("match", "0.0.1"), _present("match", "0.0.2")])))
    assert found["phase match"].startswith("warn: versions 0.0.1, 0.0.2 answer")


def test_a_process_whose_clocks_are_off_is_named() -> None:
    def process(server_time_off_s: float = 0.0, wall_off_s: float = 0.0) -> Clocks:
        return Clocks(("loom-execute", "loom-match"), "phases-1", "box", server_time_off_s, wall_off_s)

    def judged(clocks: Clocks) -> dict[str, str]:
        return troubles(list(process_clocks([clocks])))

    who = "loom-execute, loom-match (phases-1) on box"
    assert judged(process(0.9, -0.9)) == {}
    assert judged(process(wall_off_s=3600)) == {
        "clock": f"warn: the wall clock of {who} is 3600.00 s ahead of the server's"
    }
    assert judged(process(wall_off_s=-2)) == {"clock": f"warn: the wall clock of {who} is 2.00 s behind the server's"}
    assert judged(process(-3600, 0)) == {"clock": f"fail: {who} is 3600.00 s behind the server's time in its decisions"}


@pytest.mark.slow
async def test_processes_that_are_wrong_about_the_servers_time_are_found(on_bus: Where, client: Bus) -> None:
    url, namespace = on_bus
    async with (
        running_phases(url, names=("sense",), namespace=namespace),
        running_phases(url, names=("match",), namespace=namespace) as match,
        running_nodes(url, nodes, namespace=namespace) as host,
    ):
        assert len(await clocks(client)) == 3
        match.clock._offset_s += 3600
        host.bus.clock._offset_s -= 5
        await client.sync_clock()
        found = [finding.message for finding in await examine(client, ClusterConfig()) if finding.about == "clock"]

    plain = [re.sub(r"\(.*\) on \S+", "", text) for text in found[1:]]
    assert [re.sub(r"\d+\.\d\d", lambda number: f"{float(number[0]):.0f}", text) for text in plain] == [
        f"{namespace}-match  is 3600 s ahead of the server's time in its decisions",
        f"{namespace}-node  is 5 s behind the server's time in its decisions",
    ]


def _present(service: str, version: str) -> ServiceInstance:
    return ServiceInstance(type="", name=f"loom-{service}", id=version, version=version, metadata={"service": service})


def test_busy_hosts_and_backlogs_are_noticed() -> None:
    host = AnnouncedHost(host_id="h", nodes=(AnnouncedNode(node_id="n", slots=4),), running=4)
    assert node_hosts([host]).mark == "ok"
    assert node_hosts([msgspec.structs.replace(host, queued=1)]).mark == "warn"

    def waiting(**pending: tuple[int, int]) -> dict[str, str]:
        parts = {
            name: Part(name, {"num_pending": count, "num_redelivered": again}, ())
            for name, (count, again) in pending.items()
        }
        return troubles(list(backlog(Inspection({}, parts), ClusterConfig(max_in_flight=10, intake_limit=100))))

    assert waiting(scale=(10, 0), intake_low=(79, 0)) == {}
    assert waiting(scale=(11, 0)) == {"backlog": "warn: scale: 11 wait"}
    assert waiting(scale=(0, 2)) == {"backlog": "warn: scale: 2 in hand were delivered again"}
    assert waiting(intake_low=(40, 0), intake_high=(40, 0)) == {"backlog": "warn: intake: 80 of at most 100 wait"}


# -- servers that will not do


@pytest.mark.slow
async def test_without_a_server_there_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"nats://127.0.0.1:{probe.getsockname()[1]}"
    ended = await loom(tmp_path, "doctor", NATS_URL=url)

    assert (ended.code, ended.out, ended.err.count("\n")) == (3, "", 1)
    assert ended.err.startswith("bus_unavailable: no nats-server at ")


@asynccontextmanager
async def aged(url: str, version: bytes) -> AsyncIterator[str]:
    """The server of `url`, which introduces itself with an older version."""
    host, port = url.removeprefix("nats://").split(":")

    async def pass_on(ours: asyncio.StreamReader, theirs: asyncio.StreamWriter) -> None:
        while chunk := await ours.read(65536):
            theirs.write(re.sub(rb'"version":"[^"]+"', b'"version":"' + version + b'"', chunk))
        theirs.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pass_on(server_reader, writer), pass_on(reader, server_writer))

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as proxy:
        yield f"nats://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"


@pytest.mark.slow
async def test_an_old_server_is_to_be_upgraded(nats_url: str, tmp_path: Path) -> None:
    async with aged(nats_url, b"2.9.10") as url:
        ended = await loom(tmp_path, "doctor", NATS_URL=url)

    assert (ended.code, ended.err) == (1, "")
    assert ended.out == (
        f"fail server         nats-server 2.9.10 at {url} is too old → "
        "upgrade it to 2.12 or newer: loom needs message schedules\n"
    )


async def test_a_server_without_jetstream_is_reported_with_the_remedy(nats_url: str, tmp_path: Path) -> None:
    words = (find_server()[0], "-a", "127.0.0.1", "-p", "-1")
    async with command(tmp_path, *words) as server:
        await server.wait_for_output("Server is ready")
        address = re.findall(r"client connections on (\S+)", server.err)[0]
        async with Bus(f"nats://{address}") as bus:
            found = troubles(await examine(bus, ClusterConfig()))

    assert found == {"jetstream": "fail: JetStream is off on this server"}


# -- presence


async def test_only_services_of_the_own_namespace_are_listed(phases: Bus, client: Bus, nats_url: str) -> None:
    async with Bus(nats_url, namespace=f"{client.subjects.namespace}-other") as stranger:
        assert await discover(stranger, within_s=0.2) == []
        assert len(await discover(client, within_s=5, enough=lambda there: len(there) == len(PHASES))) == len(PHASES)


async def test_phases_are_found_as_nats_services_are(on_bus: Where, phases: Bus, client: Bus) -> None:
    name = f"{client.subjects.namespace}-match"
    ping = json.loads((await client.requests.request(f"$SRV.PING.{name}")).data)
    info = json.loads((await client.requests.request(f"$SRV.INFO.{name}.{ping['id']}")).data)

    assert ping["type"] == "io.nats.micro.v1.ping_response"
    assert (ping["name"], ping["id"]) == (name, phases.instance)
    assert re.fullmatch(r"\d+\.\d+\.\d+", ping["version"])
    assert ping["metadata"]["service"] == "match"
    clocks = {name: float(info["metadata"].pop(name)) for name in ("server_time", "wall_clock")}
    assert clocks == {
        name: pytest.approx(client.clock.now(), abs=2) for name in clocks
    }  # the server runs on this machine
    health = json.loads(info["metadata"].pop("health"))
    assert {name: info["metadata"].pop(name) for name in ("settings", "settings_digest")} == settings_facts(
        ClusterConfig()
    )
    assert health.get("handled", 0) == health.get("in_hand", 0) == 0
    assert info == {**ping, "type": "io.nats.micro.v1.info_response", "description": "match of a loom cluster"} | {
        "endpoints": []
    }


@pytest.mark.slow
async def test_a_phase_that_answers_and_does_not_work_is_found(
    on_bus: Where, client: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, namespace = on_bus
    monkeypatch.setattr("loom.runner.doctor.working.LOOK_AGAIN_S", 0.1)
    async with Bus(url, namespace=namespace, role="phases") as bus:
        group = PhaseGroup(bus, ("scale", "adapt"))
        await group.start()
        scale, adapt = group._started
        assert isinstance(scale, Scale)
        assert isinstance(adapt, Adapt)
        await scale._loop._consumers[0].stop()
        adapt._tasks[0].cancel()
        env = envelope(ad(task_id="t1"), now=client.clock.now())
        await client.jetstream.publish(client.subjects.task("scale", "normal", "t1"), env)
        await RewardBus(bus=client).publish(reward(1))
        found = troubles(await examine(client, ClusterConfig()))
        await group.drain()

    assert found["work scale"] == "fail: waiting messages: 1; none is taken"
    assert found["work adapt"] == "fail: rewards not read: 1; none is being read"


@pytest.mark.slow
async def test_messages_that_phases_left_out_are_a_warning(on_bus: Where, client: Bus) -> None:
    url, namespace = on_bus
    async with running_phases(url, names=("adapt",), namespace=namespace) as bus:
        await client.jetstream.publish(
            client.subjects.of("reward", "rules", "local", "n1", "code"), b'{"seconds":1e308}'
        )
        await until(lambda: bus.discards.counts, what="the reward is left out")
        found = troubles(await examine(client, ClusterConfig()))
    assert found["discards"] == "warn: messages were left out: 1 reward_undecodable"
