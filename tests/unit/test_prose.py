"""The prose of source and pages: plain words, and sentences of a bounded length.

Run as a script, with tests/ on PYTHONPATH, this file lists what breaks the rules: `python tests/unit/test_prose.py
[FILE]…`.
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
from support.prose import (
    ROOT,
    SOURCE,
    TESTS,
    Passage,
    length,
    modules,
    names_of_tests,
    passages_of_module,
    passages_of_page,
)

DIALECT = re.compile(
    r"\b(?:whoever|somebody|nobody|anybody|everybody|told|tells|said|says|heard|hears|fares|anew|for ever|beside"
    r"|(?<!random )seeds?(?![-:])"
    r"|(?<!there )(?:is|are|was|were) no(?! (?:longer|more|less|later|earlier|different)\b) \w+)\b",
    flags=re.IGNORECASE,
)
LONG, TOO_LONG = 25, 40
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("[!.]*.md")))


@dataclass(frozen=True)
class Limits:
    """The amounts of forbidden prose that a folder has or may have."""

    dialect: float = 0.5
    """Words of dialect per 1,000 words."""
    long: float = 10.0
    """Percent of the sentences that may have more than 25 words."""
    too_long: int = 0
    """Sentences of more than 40 words."""


LIMITS = Limits()


@cache
def passages_of(folder: str) -> list[Passage]:
    """The prose of a folder, or of README.md and docs/ by the name `pages`."""
    if folder == "pages":
        return list(chain.from_iterable(map(passages_of_page, PAGES)))
    return list(chain.from_iterable(map(passages_of_module, modules(folder))))


def passages_of_tests(path: Path) -> list[Passage]:
    """The names of a module's tests, its docstrings and its comments; literals may be test data."""
    return [*names_of_tests(path), *passages_of_module(path, with_literals=False)]


def dialect(passages: Iterable[Passage]) -> list[str]:
    """One line for each word of dialect, with its place and its text."""
    return [
        f"{passage.path}:{passage.line}: '{word}' in: {' '.join(passage.text.split())}"
        for passage in passages
        for word in DIALECT.findall(passage.prose)
    ]


def longer(passages: Iterable[Passage], words: int) -> list[str]:
    """One line for each sentence of more than so many words, with its place."""
    return [
        f"{passage.path}:{passage.line}: {length(sentence)} words: {sentence}"
        for passage in passages
        if passage.is_documentation
        for sentence in passage.sentences
        if length(sentence) > words
    ]


def measured(passages: list[Passage]) -> Limits:
    words = sum(len(passage.words) for passage in passages)
    sentences = sum(len(passage.sentences) for passage in passages if passage.is_documentation)
    return Limits(
        dialect=1000 * len(dialect(passages)) / max(words, 1),
        long=100 * len(longer(passages, LONG)) / max(sentences, 1),
        too_long=len(longer(passages, TOO_LONG)),
    )


@pytest.mark.parametrize("folder", [*SOURCE, "pages"])
def test_words_of_dialect_are_rare(folder: str) -> None:
    """Plain words are searchable and translatable: sentences name their subject, and describe the machine."""
    passages = passages_of(folder)
    limit = LIMITS.dialect

    assert measured(passages).dialect <= limit, "\n".join([f"more than {limit} per 1,000 words:", *dialect(passages)])


@pytest.mark.parametrize("folder", TESTS)
def test_names_docstrings_and_comments_of_tests_have_no_word_of_dialect(folder: str) -> None:
    lines = dialect(chain.from_iterable(map(passages_of_tests, modules(folder))))

    assert not lines, "\n".join(["plain words, please:", *lines])


@pytest.mark.parametrize("folder", [*SOURCE, "pages"])
def test_nine_sentences_of_ten_have_at_most_25_words(folder: str) -> None:
    passages = passages_of(folder)
    limit = LIMITS.long

    assert measured(passages).long <= limit, "\n".join(
        [f"more than {limit} % of the sentences have over {LONG} words; split these:", *longer(passages, LONG)]
    )


@pytest.mark.parametrize("folder", [*SOURCE, "pages"])
def test_no_sentence_has_more_than_40_words(folder: str) -> None:
    lines = longer(passages_of(folder), TOO_LONG)
    limit = LIMITS.too_long

    assert len(lines) <= limit, "\n".join([f"more than {limit} sentences have over {TOO_LONG} words; split:", *lines])


# -- the measure itself


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Whoever asks is told.", 2),
        ("The node is no longer there, and there is no other.", 0),
        ("What is no agent is refused.", 1),
        ("The `told` flag and bus/told.py are identifiers.", 0),
        ("Besides, a random seed is fine.", 0),
        ("The seed's formula stands beside it.", 2),
        ("seed: Start of the random numbers.", 0),
    ],
)
def test_dialect_is_counted_in_prose_alone(text: str, count: int) -> None:
    assert len(dialect([Passage("page.md", 1, text, is_documentation=True)])) == count


def test_a_page_is_split_into_paragraphs_items_cells_and_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.prose.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# Heading\n\nOne two\nthree. Four, e.g. five `a b c`.\n\n- Item\n- Item [two](x.md)\n\n"
        "| A | B |\n|---|---|\n| cell | a cell. Two |\n\n```python\ncode = 1\n```\nEnd.\n",
        encoding="utf-8",
    )

    passages = list(passages_of_page(page))

    sentences = [(passage.line, sentence) for passage in passages for sentence in passage.sentences]
    assert sentences == [
        (3, "One two three."),
        (3, "Four, e.g. five CODE."),
        (6, "- Item"),
        (7, "- Item two"),
        (9, "A"),
        (9, "B"),
        (11, "cell"),
        (11, "a cell."),
        (11, "Two"),
        (16, "End."),
    ]
    assert length("- Item `a`, two") == 3


def test_a_module_has_docstrings_comments_and_literals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.prose.ROOT", tmp_path)
    module = tmp_path / "module.py"
    module.write_text(
        '"""Module.\n\nMore.\n\nArgs:\n    first: A value.\n    second: Another.\n"""\n'
        'KEY = "one"  # why\nTEXT = f"two {KEY} words"\n',
        encoding="utf-8",
    )

    found = {(passage.line, passage.text.strip(), passage.is_documentation) for passage in passages_of_module(module)}

    assert found >= {(1, "Module.", True), (3, "More.", True), (6, "first: A value.", True), (9, "why", False)}
    assert not any(text == "one" for _, text, _ in found)
    assert not any("words" in passage.text for passage in passages_of_module(module, with_literals=False))


def test_the_name_of_a_test_is_read_as_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.prose.ROOT", tmp_path)
    module = tmp_path / "test_module.py"
    module.write_text("def test_nobody_is_told(): ...\n\n\ndef told(): ...\n", encoding="utf-8")

    assert len(dialect(passages_of_tests(module))) == 2


if __name__ == "__main__":
    named = [Path(name).resolve() for name in sys.argv[1:]]
    files = [*PAGES, *chain.from_iterable(map(modules, (*SOURCE, *TESTS)))]
    for path in named or files:
        if path.is_relative_to(ROOT / "tests"):
            lines = dialect(passages_of_tests(path))
        else:
            prose = list((passages_of_page if path.suffix == ".md" else passages_of_module)(path))
            lines = [*dialect(prose), *longer(prose, LONG)]
        for line in lines:
            print(line)
