"""Files given to the command line: their contents, and the errors for unreadable ones."""

import signal
import sys
from pathlib import Path

import pytest

from loom.runner.cli.input_files import InvalidFile, load_node_file, load_tasks
from loom.schemas.errors import InvalidTask

NODES = """
from loom.types import AgentNode, CapabilityProfile

def shout(description: str) -> str:
    return description.upper()

nodes = [AgentNode(id="shouter", capabilities=CapabilityProfile(scores={"loud": 0.9}), agent=shout)]
"""


@pytest.fixture(autouse=True)
def _import_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo the changes of a loaded file to the importable modules after each test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tasks.jsonl"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "agents.py"


def test_tasks_have_the_order_of_their_lines_and_empty_lines_are_skipped(file: Path) -> None:
    file.write_bytes(
        b'\xef\xbb\xbf{"task_id": "one", "description": "a"}\r\n\n  \n{"description": "b", "domain": "\xe4\xbb\xa3"}'
    )

    ads = load_tasks(file)

    assert [ad.description for ad in ads] == ["a", "b"]
    assert ads[0].task_id == "one"
    assert ads[1].domain == "代"


@pytest.mark.parametrize(
    ("line", "blamed"),
    [
        ('{"description": "x", "domian": "y"}', "line 2, field domian: "),
        ('{"description": "x", "priority": "urgent"}', "line 2, field priority: "),
        ('{"description": " "}', "line 2, field description: "),
        ('{"description": "x", "task_id": "one"}', "line 2, field task_id: one is the task of line 1"),
        ("{'description': 'x'}", "line 2: "),
        ("[]", "line 2: "),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_field(file: Path, line: str, blamed: str) -> None:
    file.write_text(f'{{"task_id": "one", "description": "fine"}}\n{line}\n')

    with pytest.raises(InvalidTask) as caught:
        load_tasks(file)

    assert caught.value.message.startswith(f"{file}, {blamed}")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_tasks_is_refused(file: Path, text: str) -> None:
    file.write_text(text)

    with pytest.raises(InvalidFile, match="holds no task"):
        load_tasks(file)


def test_a_missing_file_of_tasks_is_named(file: Path) -> None:
    with pytest.raises(InvalidFile, match=r"tasks\.jsonl: No such file"):
        load_tasks(file)


def test_nodes_have_the_order_of_the_file(script: Path) -> None:
    script.write_text(NODES)

    (node,) = load_node_file(script).nodes

    assert node.id == "shouter"
    assert node.to_bid(domain="loud").self_rating == 0.9
    assert node.agent("hi") == "HI"


def test_a_file_of_nodes_may_import_its_neighbours_and_define_dataclasses(script: Path) -> None:
    script.with_name("neighbour_of_agents.py").write_text("from __future__ import annotations\nNAME = 'next-door'")
    script.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from neighbour_of_agents import NAME\n"
        "@dataclass\nclass Odd:\n    limit: ClassVar[int] = 1\n" + NODES + "nodes[0].id = NAME\n"
    )

    assert load_node_file(script).nodes[0].id == "next-door"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(:\n", "agents.py, line 1: invalid syntax"),
        ("x = 1\nraise RuntimeError('no\\nkey')\n", "agents.py, line 2: RuntimeError: no key"),
        ("import sys\nsys.exit(3)\n", "agents.py, line 2: SystemExit: 3"),
        ("\nraise KeyboardInterrupt\n", "agents.py, line 2: KeyboardInterrupt"),
        ("\n\nraise GeneratorExit('x')\n", "agents.py, line 3: GeneratorExit: x"),
        ("import asyncio\nraise asyncio.CancelledError\n", "agents.py, line 2: CancelledError"),
        ("raise BaseExceptionGroup('x', [KeyboardInterrupt()])\n", "agents.py, line 1: BaseExceptionGroup: x"),
        ("def f(): f()\nf()\n", "agents.py, line 1: RecursionError: "),
        (
            "class E(BaseException):\n    def __str__(self): raise KeyboardInterrupt\nraise E\n",
            "agents.py, line 3: E: (its __str__ raised KeyboardInterrupt)",
        ),
        ("raise ValueError('Bearer abcdefgh123')\n", "agents.py, line 1: ValueError: Bearer ***"),
        (
            "class N:\n    @property\n    def id(self): raise KeyboardInterrupt\nnodes = [N()]\n",
            "agents.py: nodes[0] cannot be looked at: KeyboardInterrupt",
        ),
        ("import json\n\njson.loads('{')\n", "agents.py, line 3: JSONDecodeError: "),
        ("x = 1\n", "agents.py: defines no `nodes`"),
        ("nodes = []\n", "agents.py: defines no `nodes`"),
        ("nodes = {'a': 1}\n", "agents.py: defines no `nodes`"),
        ("nodes = [3]\n", "agents.py: nodes[0] is a int without `id`"),
        (NODES + "nodes[0].agent = None\n", "agents.py: nodes[0] (shouter) has no agent"),
        (NODES + "nodes[0].domains = []\n", "agents.py: nodes[0] (shouter) has no valid domains"),
        (
            NODES + "nodes[0].capabilities.scores['loud'] = 9\n",
            "agents.py: nodes[0] (shouter) has the rating 9 in 'loud'",
        ),
        (NODES + "nodes[0].agent = 'shout'\n", "agents.py: nodes[0] (shouter): a str is not an agent"),
        (NODES + "nodes[0].agent = lambda a, b: a\n", "agents.py: nodes[0] (shouter): <lambda> must take one argument"),
        (NODES + "nodes[0].id = 'a b'\n", "agents.py: nodes[0] has an id that does not match"),
        (NODES + "nodes.append(nodes[0])\n", "agents.py: nodes[1] has the id of an earlier one, shouter"),
    ],
)
def test_a_file_without_usable_nodes_is_refused_with_the_reason(script: Path, source: str, reason: str) -> None:
    script.write_text(source)

    with pytest.raises(InvalidFile) as caught:
        load_node_file(script)

    assert reason in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["nothing.py", "folder"])
def test_a_path_that_is_not_a_python_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()

    with pytest.raises(InvalidFile, match=f"{name}: no such file"):
        load_node_file(tmp_path / name)


def test_ctrl_c_while_a_file_is_loaded_is_not_an_error_of_the_file(script: Path) -> None:
    script.write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(10)\n")
    before = signal.getsignal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        load_node_file(script)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name", ["a" * 300 + ".py", "agents.py/deeper.py"])
def test_a_file_that_the_system_refuses_is_named(name: str, script: Path) -> None:
    script.write_text(NODES)

    with pytest.raises(InvalidFile) as refused:
        load_node_file(script.parent / name)

    assert refused.value.message.startswith(f"{script.parent / name}: ")
