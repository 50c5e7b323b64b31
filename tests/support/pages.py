"""The pages that people read, README.md and docs/*.md: the code, the commands and the tables on them."""

import asyncio
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))

_PYTHON = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```)?", flags=re.MULTILINE | re.DOTALL)
_SHELL = re.compile(r"^```sh\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.*)$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Program:
    """A block of Python on a page."""

    page: str
    number: int
    """From 1, among the blocks of its page."""
    code: str
    printed: str
    """The text block right after it, which is what it prints; empty: none."""

    def __str__(self) -> str:
        return f"{self.page} {self.number}"


def text_of(page: str) -> str:
    """Return the text of a page, its name being the path from the root."""
    return (ROOT / page).read_text(encoding="utf-8")


def programs(page: str) -> list[Program]:
    """Return the blocks of Python on a page, in order."""
    return [Program(page, n, *found) for n, found in enumerate(_PYTHON.findall(text_of(page)), start=1)]


def commands(page: str) -> list[list[str]]:
    """Return the lines of the shell blocks on a page as words, without comments."""
    blocks: list[str] = _SHELL.findall(text_of(page))
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def section(page: str, heading: str) -> str:
    """Return what is below a heading of level 2 or 3 that begins so, up to the next heading of any level."""
    [below] = re.findall(rf"^###? {re.escape(heading)}.*?\n(.*?)(?=^#|\Z)", text_of(page), re.MULTILINE | re.DOTALL)
    return str(below)


def table(page: str, heading: str) -> list[list[str]]:
    """Return the rows of the tables below a heading, without their heads, as cells."""
    lines = [line for line in section(page, heading).splitlines() if line.startswith("|")]
    rows = [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rules = {place for place, row in enumerate(rows) if set("".join(row)) <= {"-", ":"}}
    return [row for place, row in enumerate(rows) if place not in rules and place + 1 not in rules]


def anchors(page: str) -> set[str]:
    """Return what links to the headings of a page end with, as GitHub makes it of them."""
    without_code = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(without_code)}


async def output_of(command: list[str], **environment: str) -> str:
    """Return what a command prints, run in the root with this environment and without NATS_URL, if it succeeds."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**{key: value for key, value in os.environ.items() if key != "NATS_URL"}, **environment},
    )
    async with asyncio.timeout(40):
        out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return out.decode()
