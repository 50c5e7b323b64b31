"""compose.yaml and the Dockerfile: their commands are loom's, and what they name is there."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.words import accepted

from loom.bus.topology import MIN_SERVER
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import PHASES

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if name != "nats"}
CLUSTER: dict[str, Any] = yaml.safe_load((ROOT / "compose.cluster.yaml").read_text())["services"]
SERVERS = {name: service for name, service in CLUSTER.items() if name.startswith("nats-")}


def test_there_is_a_service_for_each_phase_a_node_a_tap_and_the_server() -> None:
    assert SERVICES.keys() == {"nats", *PHASES, "node", "tap"}
    assert all(SERVICES[phase]["command"] == ["phase", phase] for phase in PHASES)
    assert SERVICES["tap"]["profiles"]
    assert not any(service.get("profiles") for name, service in SERVICES.items() if name != "tap")


@pytest.mark.parametrize("name", OURS)
def test_every_command_line_is_one_of_looms(name: str) -> None:
    service = OURS[name]

    assert accepted(service["command"]) == service["command"][0]
    if not service["healthcheck"].get("disable"):
        shell, binary, *words = service["healthcheck"]["test"]
        assert (shell, binary) == ("CMD", "loom")
        assert accepted(words) == "doctor"


@pytest.mark.parametrize("words", ["phase", "doctor --there", "nonsense", "up --port x"])
def test_a_wrong_command_line_would_be_noticed(words: str) -> None:
    with pytest.raises(Exception, match=r"[Mm]issing|[Nn]o such|valid integer"):
        accepted(words.split())


@pytest.mark.parametrize("name", OURS)
def test_a_service_can_be_scaled_waits_for_the_server_and_has_time_to_drain(name: str) -> None:
    service = OURS[name]

    assert not {"container_name", "ports", "hostname"} & service.keys()
    assert service["depends_on"] == {"nats": {"condition": "service_healthy"}}
    assert service["environment"]["NATS_URL"] == "nats://nats:4222"
    assert int(service["stop_grace_period"].removesuffix("s")) > ClusterConfig().drain_timeout_s + 5


def test_the_server_is_recent_enough_and_keeps_its_streams_on_a_volume() -> None:
    server = SERVICES["nats"]
    version = re.fullmatch(r"nats:(\d+)\.(\d+)-alpine", server["image"])

    assert version is not None
    assert tuple(map(int, version.groups())) >= MIN_SERVER
    assert "--jetstream" in server["command"]
    folder = server["command"][server["command"].index("--store_dir") + 1]
    assert server["volumes"] == [f"{next(iter(COMPOSE['volumes']))}:{folder}"]
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])  # there is no password


def test_what_is_mounted_and_copied_is_there_and_the_image_runs_loom_without_rights() -> None:
    mounted = [Path(volume.split(":")[0]) for volume in SERVICES["node"]["volumes"]]
    assert (ROOT / mounted[0] / Path(SERVICES["node"]["command"][1]).name).is_file()
    build, final = re.split(r"(?m)^FROM .*$", DOCKERFILE)[1:]
    sources = [word for line in re.findall(r"(?m)^COPY (.+)$", build) for word in line.split()[:-1]]
    assert all((ROOT / source).exists() for source in sources)
    assert {link.resolve().name for link in (ROOT / "loom").iterdir() if link.is_symlink()} <= set(sources)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(sources) == kept
    assert re.search(r"(?m)^USER [1-9]\d*:[1-9]\d*$", final)
    assert 'ENTRYPOINT ["loom"]' in final
    assert "pip" not in final  # nothing of the build is left in it


def test_the_comments_of_the_file_are_commands_that_make_sense() -> None:
    lines = re.findall(r"(?m)^#   (docker compose .+)$", (ROOT / "compose.yaml").read_text())

    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        scaled = [words[at + 1].split("=")[0] for at, word in enumerate(words) if word == "--scale"]
        assert set(scaled) <= set(PHASES)


# -- compose.cluster.yaml


def test_the_cluster_has_the_same_phases_and_nodes_on_three_servers() -> None:
    assert CLUSTER.keys() == {"nats-1", "nats-2", "nats-3", *PHASES, "node", "doctor"}
    for name in (*PHASES, "node"):
        service, single = CLUSTER[name], SERVICES[name]
        own = {"NATS_URL", "LOOM_REPLICAS"}
        assert {key: value for key, value in service["environment"].items() if key not in own} == {
            key: value for key, value in single["environment"].items() if key not in own
        }
        differs = {"environment", "depends_on", "deploy"}
        assert {k: v for k, v in service.items() if k not in differs} == {
            k: v for k, v in single.items() if k not in differs
        }
        assert (name == "node") == ("deploy" not in service)
    assert CLUSTER["doctor"]["profiles"]
    assert accepted(CLUSTER["doctor"]["command"]) == "doctor"


@pytest.mark.parametrize("name", sorted(CLUSTER.keys() - SERVERS.keys()))
def test_everybody_knows_all_servers_of_the_cluster_and_keeps_a_copy_on_each(name: str) -> None:
    service = CLUSTER[name]

    assert service["environment"]["NATS_URL"] == ",".join(f"nats://{server}:4222" for server in SERVERS)
    assert service["environment"]["LOOM_REPLICAS"] == str(len(SERVERS))
    assert service["depends_on"] == {server: {"condition": "service_healthy"} for server in SERVERS}


def test_the_servers_are_alike_but_for_name_port_and_volume_and_know_each_other() -> None:
    names, ports, volumes = set(), set(), set()
    for name, server in SERVERS.items():
        words = dict(word.removeprefix("--").partition("=")[::2] for word in server["command"])
        assert words.pop("server_name") == name
        assert words["routes"].split(",") == [f"nats://{other}:6222" for other in SERVERS]
        assert words["cluster"] == "nats://0.0.0.0:6222"
        assert {"jetstream", "cluster_name"} <= words.keys()
        names.add(tuple(sorted(words.items())))
        (port,), (volume,) = server["ports"], server["volumes"]
        assert port.startswith("127.0.0.1:")  # there is no password
        assert volume.endswith(f":{words['store_dir']}")
        ports.add(port)
        volumes.add(volume)
        assert server["image"] == SERVICES["nats"]["image"]
        assert server["healthcheck"] == SERVICES["nats"]["healthcheck"]

    assert (len(names), len(ports), len(volumes)) == (1, 3, 3)
