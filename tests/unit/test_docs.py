"""The pages of docs/: generated tables equal the code, and checked statements are true.

Run as a script, this file writes the tables of docs/subjects.md.
"""

import ast
import inspect
import json
import re
from collections.abc import Iterator

import pytest
from support.cli_parsing import parse_command
from support.pages import PAGES, ROOT, anchors, commands, text_of

from loom.bus.bus import Bus
from loom.bus.subjects import FAMILIES
from loom.bus.topology import LANES, streams
from loom.runner.doctor import agreement, diagnosis, working
from loom.schemas.checks.ad import parse_ad
from loom.schemas.config import ClusterConfig
from loom.schemas.tokens import domain_token

DOCS = ROOT / "docs"
SUBJECTS = DOCS / "subjects.md"
BEGIN, END = "<!-- tables: written by tests/unit/test_docs.py -->\n", "<!-- end of tables -->\n"
DAY_NS = 86_400 * 10**9


def test_the_page_of_subjects_holds_the_tables_as_the_code_has_them() -> None:
    """After a change of subjects or streams: `python tests/unit/test_docs.py`, with tests/ on PYTHONPATH."""
    assert tables() in SUBJECTS.read_text(encoding="utf-8")


def test_the_page_of_subjects_has_the_tokens_of_its_domains() -> None:
    rows = re.findall(r'(?m)^\| `(".*")` \| `([^`]+)` \|$', SUBJECTS.read_text(encoding="utf-8"))
    tokens = {json.loads(domain): token for domain, token in rows}

    assert {"代码", "数据"} <= set(tokens)
    assert tokens == {domain: domain_token(domain) for domain in tokens}


def test_every_finding_of_the_doctor_is_explained() -> None:
    sources = [ast.parse(inspect.getsource(module)) for module in (diagnosis, working, agreement)]
    calls = [node for source in sources for node in ast.walk(source) if isinstance(node, ast.Call)]
    about = {
        str(call.args[0].value).removesuffix(" adapt") if isinstance(call.args[0], ast.Constant) else "phase …"
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id.lstrip("_") in {"ok", "warn", "fail"}
    }

    explained = re.findall(r"(?m)^\| `([^`]+)` \|", (DOCS / "operating.md").read_text(encoding="utf-8"))
    assert about == set(explained)


@pytest.mark.parametrize(
    "words",
    [words for page in PAGES for words in commands(page) if words[:1] == ["loom"]],
    ids=" ".join,
)
def test_the_commands_of_the_pages_are_looms(words: list[str]) -> None:
    assert parse_command(words[1:]) == words[1]


@pytest.mark.parametrize(
    "ad", [words[-1] for page in PAGES for words in commands(page) if words[:2] == ["nats", "req"] and "{" in words[-1]]
)
def test_the_ads_of_the_pages_may_be_submitted(ad: str) -> None:
    assert parse_ad(ad.encode()).description


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text_of(page)):
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), target
        assert not anchor or anchor in anchors(str(there.resolve().relative_to(ROOT))), target


def test_every_test_named_for_a_promise_exists() -> None:
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
        yield f"| `loom.{family.pattern}` | {family.kind} | {family.body} | {family.route} |"


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
