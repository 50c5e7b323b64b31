"""The pages of docs/: what can be generated equals the code, and what can be checked is true.

Run as a script, this file writes the tables of docs/subjects.md.
"""

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.words import accepted

from loom.bus.client import Bus
from loom.bus.subjects import FAMILIES
from loom.bus.topology import LANES, streams
from loom.runner import agreement, doctor, working
from loom.schemas.config import ClusterConfig

DOCS = Path(__file__).parents[2] / "docs"
SUBJECTS = DOCS / "subjects.md"
BEGIN, END = "<!-- tables: written by tests/unit/test_docs.py -->\n", "<!-- end of tables -->\n"
DAY_NS = 86_400 * 10**9


def test_the_page_of_subjects_holds_the_tables_as_the_code_has_them() -> None:
    """After a change of subjects or streams: `python tests/unit/test_docs.py`, with tests/ on PYTHONPATH."""
    assert tables() in SUBJECTS.read_text(encoding="utf-8")


def test_every_finding_of_the_doctor_is_explained() -> None:
    sources = [ast.parse(inspect.getsource(module)) for module in (doctor, working, agreement)]
    calls = [node for source in sources for node in ast.walk(source) if isinstance(node, ast.Call)]
    about = {
        str(call.args[0].value).removesuffix(" adapt") if isinstance(call.args[0], ast.Constant) else "phase …"
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id.lstrip("_") in {"ok", "warn", "fail"}
    }

    explained = re.findall(r"(?m)^\| `([^`]+)` \|", (DOCS / "operating.md").read_text(encoding="utf-8"))
    assert about == set(explained)


def commands() -> Iterator[str]:
    for page in sorted(DOCS.glob("*.md")):
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            yield from (line for line in block.splitlines() if line.startswith("loom "))


@pytest.mark.parametrize("line", list(commands()))
def test_the_commands_of_the_pages_are_looms(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]

    assert accepted(words) == words[0]


def test_links_between_pages_lead_somewhere() -> None:
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_test_that_shows_a_promise_is_there() -> None:
    named = re.findall(r"`(\w+/test_\w+\.py)`", (DOCS / "reliability.md").read_text(encoding="utf-8"))
    assert len(set(named)) > 10
    assert [name for name in named if not (DOCS.parent / "tests" / name).exists()] == []


# -- the tables


def tables() -> str:
    parts = ("\n".join(part) for part in (subject_table(), stream_table(), consumer_table()))
    return BEGIN + "\n\n".join(parts) + "\n" + END


def subject_table() -> Iterator[str]:
    yield from ("| Subject | Kind | Body | From → to |", "|---|---|---|---|")
    for family in FAMILIES:
        subject = ".".join(("loom", family.name, *(f"<{token}>" for token in family.tokens)))
        yield f"| `{subject}` | {family.kind} | {family.body} | {family.route} |"


def stream_table() -> Iterator[str]:
    yield from ("| Stream | Subjects | Kind | Keeps at most |", "|---|---|---|---|")
    for config in streams(Bus("nats://nowhere"), ClusterConfig()):
        kind = "work queue" if config["retention"] == "workqueue" else "log"
        kind = "bucket" if config["name"].startswith("KV_") else kind
        bounds = [
            f"{config['max_msgs']:,} messages" if "max_msgs" in config else "",
            f"{config['max_bytes'] >> 20} MiB" if "max_bytes" in config else "",
            f"{config['max_age'] // DAY_NS} days" if config.get("max_age") else "",
        ]
        names = ", ".join(f"`{subject}`" for subject in config["subjects"])
        yield f"| `{config['name']}` | {names} | {kind} | {', '.join(filter(None, bounds)) or 'no limit'} |"


def consumer_table() -> Iterator[str]:
    yield from ("| Consumer | Stream | Subjects |", "|---|---|---|")
    for lane in LANES:
        yield f"| `{lane.name}` | `LOOM_{lane.stream}` | `{'.'.join(('loom', *lane.filter))}` |"


if __name__ == "__main__":
    before, rest = SUBJECTS.read_text(encoding="utf-8").split(BEGIN)
    SUBJECTS.write_text(before + tables() + rest.split(END)[1], encoding="utf-8")
