"""The workflow of CI tests the versions promised by pyproject.toml and the server check."""

import tomllib

import yaml
from support.prose import ROOT

from loom.runner.server.nats_server import MIN_VERSION

WORKFLOW = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")


def test_the_oldest_server_of_ci_is_the_oldest_that_loom_accepts() -> None:
    assert f"'v{'.'.join(map(str, MIN_VERSION))}.0'" in WORKFLOW


def test_the_oldest_python_of_ci_is_the_oldest_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = yaml.safe_load(WORKFLOW)["jobs"]["tests"]["strategy"]["matrix"]["python"]

    assert project["requires-python"] == f">={pythons[0]}"


def test_each_make_target_of_ci_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    steps = [step.get("run", "") for job in yaml.safe_load(WORKFLOW)["jobs"].values() for step in job["steps"]]
    targets = {run.removeprefix("make ") for run in steps if run.startswith("make ")}

    assert targets == {"setup", "check", "slow", "coverage"}
    assert [target for target in targets if f"\n{target}:" not in makefile] == []
