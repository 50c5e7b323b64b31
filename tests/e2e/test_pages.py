"""The programs on all pages run, and print the output shown after them."""

import sys
from typing import Any

import pytest
from support.openai_server import OpenAIServer
from support.pages import PAGES, Program, output_of, programs


def in_turn(page: str) -> list[Any]:
    """Each program of a page; those of the README with the quick tests, the others with the slow ones."""
    marks = () if page == "README.md" else (pytest.mark.slow,)
    return [pytest.param(each, marks=marks, id=str(each)) for each in programs(page)]


@pytest.mark.parametrize("program", [each for page in PAGES for each in in_turn(page)])
async def test_each_program_prints_what_its_page_shows(program: Program) -> None:
    """A program without shown output, such as one with a model's words, prints something if it prints at all."""
    with OpenAIServer() as model:
        command = [sys.executable, "-c", program.code]
        printed = await output_of(command, OPENAI_BASE_URL=model.base_url, OPENAI_API_KEY="test")

    if program.printed or "print(" not in program.code:
        assert printed == program.printed
    else:
        assert printed.strip()
