"""The built and installed package: everything under the one name `loom`, and nothing else."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
DEPENDENCIES = sysconfig.get_path("purelib")

IMPORT_ALL = """
import importlib, pkgutil, loom
names = [module.name for module in pkgutil.walk_packages(loom.__path__, "loom.")]
for name in names:
    if not name.endswith(".__main__"):  # importing one runs it
        importlib.import_module(name)
print(loom.__file__, *names, sep="\\n")
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)  # noqa: PLW1510
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel made from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def modules_of(folder: Path, *, beneath: str) -> set[str]:
    """Return the modules whose sources are in the tree, as dotted names under `beneath`."""
    names = set()
    for path in folder.rglob("*.py"):
        parts = [beneath, *path.relative_to(folder).with_suffix("").parts]
        names.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def all_modules() -> set[str]:
    folders = ("agents", "bus", "phases", "runner", "schemas")
    linked = (modules_of(ROOT / name, beneath=f"loom.{name}") for name in folders)
    return modules_of(ROOT / "loom", beneath="loom").union(*linked)  # rglob follows no links


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_an_installed_distribution_imports_from_anywhere(built: Path, tmp_path: Path, kind: str) -> None:
    (distribution,) = built.glob(kind)
    env = tmp_path / "env"
    venv.create(env, with_pip=False)
    python = env / "bin" / "python"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"),
        *("--no-build-isolation", "--ignore-installed", distribution),
        cwd=elsewhere,
        PYTHONPATH=DEPENDENCIES,
    )
    home, *names = run(python, "-c", IMPORT_ALL, cwd=elsewhere, PYTHONPATH=DEPENDENCIES).split()
    (packages,) = env.glob("lib/python*/site-packages")

    assert Path(home) == packages / "loom" / "__init__.py"
    assert {"loom", *names} == all_modules()
    assert {entry.name for entry in packages.iterdir() if not entry.name.endswith(".dist-info")} == {"loom"}
    assert (packages / "loom" / "py.typed").is_file()
    assert "submit" in run(env / "bin" / "loom", "--help", cwd=elsewhere, PYTHONPATH=DEPENDENCIES)


def test_a_checkout_runs_its_examples_and_installs_without_test_tools(built: Path, tmp_path: Path) -> None:
    """`make demo`, then the README's line that installs, in a tree without anything set up."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (checkout,) = tmp_path.iterdir()
    binaries = checkout / ".venv" / "bin"
    path = f"{binaries}:{os.environ['PATH']}"
    [install] = re.findall(r"^pip install .*", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)

    run("make", "demo", f"PYTHON={sys.executable}", cwd=checkout, NATS_URL="")
    run("sh", "-c", install, cwd=checkout, PATH=path)

    assert len((checkout / "results.jsonl").read_text(encoding="utf-8").splitlines()) == 14
    assert not any((binaries / tool).exists() for tool in ("pytest", "ruff", "mypy"))
    assert "loom" in run("loom", "--version", cwd=tmp_path, PATH=path)


def test_the_wheel_holds_only_sources(wheel: zipfile.ZipFile) -> None:
    stray = [
        name
        for name in wheel.namelist()
        if not re.fullmatch(r"loom/(.*\.pyi?|py\.typed)|loom_nats-[^/]*\.dist-info/.*", name) or "__pycache__" in name
    ]

    assert stray == []


def test_the_wheel_names_no_place_of_this_machine_and_no_package_index(wheel: zipfile.ZipFile) -> None:
    places = re.compile(rf"{re.escape(str(ROOT))}|{re.escape(str(Path.home()))}/|index-url|find-links|/simple\b")
    telling = [name for name in wheel.namelist() if places.search(wheel.read(name).decode())]

    assert telling == []


def test_the_sdist_carries_its_tests_and_no_leftovers(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}

    assert {"tests/conftest.py", "examples/agents.py", "Makefile", "CHANGELOG.md", "LICENSE"} <= names
    assert all(member.isfile() for member in members)
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", ".git/"))]
