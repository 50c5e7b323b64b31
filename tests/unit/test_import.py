"""The cost of an import, and the modules that it loads."""

import json
import subprocess
import sys

import pytest

PROBE = """
import json, sys, time
began = time.process_time()
{statement}
took = time.process_time() - began
print(json.dumps([took, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""


def imported(statement: str) -> tuple[float, set[str]]:
    """Return the seconds `statement` takes in a fresh interpreter and the packages that are loaded then."""
    code = PROBE.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    seconds, packages = json.loads(done.stdout)
    return seconds, set(packages)


@pytest.mark.parametrize("statement", ["import loom", "import loom.types"])
def test_importing_takes_less_than_a_quarter_of_a_second_of_cpu_time(statement: str) -> None:
    # The best of several: the machine may be busy with something else.
    assert min(imported(statement)[0] for _ in range(5)) < 0.25


@pytest.mark.parametrize("statement", ["import loom", "import loom.types"])
def test_importing_loads_neither_nats_nor_openai(statement: str) -> None:
    packages = imported(statement)[1]

    assert "loom" in packages
    assert not packages & {"nats", "openai"}


def test_every_public_name_is_importable_without_loading_openai() -> None:
    packages = imported("from loom import *")[1]

    assert "openai" not in packages
