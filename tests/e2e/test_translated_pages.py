"""The pages on migrating, and the front page in Chinese: their programs print the output shown on the pages."""

import re
import shlex
from pathlib import Path

import pytest
from support.cli_parsing import parse_command
from support.programs import output_of

ROOT = Path(__file__).parents[2]
FRONT = "README.zh-CN.md"
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8") for name in (FRONT, "docs/migrating.md", "docs/migrating.zh-CN.md")
}
PROGRAMS = [
    pytest.param(program, printed, id=name)
    for name, text in PAGES.items()
    for program, printed in re.findall(r"^```python\n(.*?)^```\n```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
]
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"^```sh\n(.*?)^```", PAGES[FRONT], re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.startswith("loom ")
]


@pytest.mark.slow
@pytest.mark.parametrize(("program", "printed"), PROGRAMS)
async def test_each_program_prints_what_its_page_shows(program: str, printed: str) -> None:
    assert await output_of("-c", program) == printed


def test_each_page_has_a_program() -> None:
    assert {param.id for param in PROGRAMS} == set(PAGES)


def test_the_snippets_of_the_front_page_are_those_that_run_as_written() -> None:
    tried = (ROOT / "tests" / "data" / "runtime.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(?!import asyncio)(.*?)^```", PAGES[FRONT], re.MULTILINE | re.DOTALL)

    assert len(shown) == 4
    assert [snippet for snippet in shown if f"```python\n{snippet}```\n" not in tried] == []


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_every_command_is_one_the_command_line_knows(words: list[str]) -> None:
    assert parse_command(words[1:]) == words[1]


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[name])

    assert [link for link in links if not ((ROOT / name).parent / link).exists()] == []


def test_both_pages_on_migrating_have_the_same_rows() -> None:
    rows = [
        [re.findall(r"`(\w[\w.]*)", line) for line in PAGES[name].splitlines() if line.startswith("|")]
        for name in ("docs/migrating.md", "docs/migrating.zh-CN.md")
    ]

    assert [set(row) for row in rows[0]] == [set(row) for row in rows[1]]
