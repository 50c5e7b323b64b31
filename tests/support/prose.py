"""The prose of the repository: comments, docstrings and string literals of source, and the text of pages."""

import ast
import os
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ("schemas", "bus", "agents", "phases", "runner", "loom", "examples")
TESTS = tuple(f"tests/{name}" for name in ("bench", "bus", "chaos", "e2e", "fundamentals", "support", "unit"))
"""Folders whose test names, docstrings and comments have no word of dialect."""

_GENERATED = re.compile(r"<!-- tables?: written by .*?<!-- end of tables? -->", flags=re.DOTALL)
_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$", flags=re.DOTALL | re.MULTILINE)
_ITEM = re.compile(r"^ *(?:[-*] |\d+[.)] |\|)")
_ROW = re.compile(r"\S {2,}\S")
"""A row of a table that is set with spaces, such as the header of a phase."""
_SECTION = re.compile(r"^ *(?:Args|Returns|Raises|Yields|Example|Attributes|Note): *$")
_END = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<=[.!?])[\"')*]*\s+(?=[\"'(*\[]*[A-Z0-9`]|\*\w+\*)")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_CODE = re.compile(r"(`+)(?:(?!\1).)+\1", flags=re.DOTALL)
_PATH = re.compile(r"[\w.-]*[/_][\w./-]*(?<=[\w/])|\w\w+\.\w[\w.]*(?<=\w)")
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")


@dataclass(frozen=True)
class Passage:
    """A piece of prose: a paragraph, an item of a list, a cell of a table, a comment or a string literal."""

    path: str
    line: int
    text: str
    is_documentation: bool
    """Whether it is part of a docstring or of a page, whose sentences have a length limit."""

    @property
    def prose(self) -> str:
        """The text with inline code, identifiers and paths as the word CODE, and links as their words."""
        return _PATH.sub("CODE", _CODE.sub("CODE", _LINK.sub(r"\1", self.text)))

    @property
    def words(self) -> list[str]:
        """The words of the prose."""
        return [word for word in _WORD.findall(self.prose) if word != "CODE"]

    @property
    def sentences(self) -> list[str]:
        """The sentences, in order."""
        return [sentence.strip() for sentence in _END.split(" ".join(self.prose.split())) if sentence.strip()]


def length(sentence: str) -> int:
    """Return the number of words of a sentence; inline code counts as one word."""
    return sum(any(map(str.isalnum, word)) for word in sentence.split())


def modules(folder: str) -> list[Path]:
    """Return the modules below a folder of the root, without following links to other folders."""
    walk = os.walk(ROOT / folder, followlinks=False)
    return sorted(Path(parent) / name for parent, _, names in walk for name in names if name.endswith(".py"))


def passages_of_module(path: Path, *, with_literals: bool = True) -> Iterator[Passage]:
    """Yield the comments, the docstrings and, by default, the string literals of a module."""
    name = str(path.relative_to(ROOT))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node) for node in _docstrings(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) in docstrings:
                yield from _paragraphs(name, node.lineno, node.value)
            elif with_literals and " " in node.value.strip():
                yield Passage(name, node.lineno, node.value, is_documentation=False)
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                yield Passage(name, token.start[0], token.string.lstrip("# "), is_documentation=False)


def names_of_tests(path: Path) -> Iterator[Passage]:
    """Yield the name of each test function of a module, as words."""
    name = str(path.relative_to(ROOT))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield Passage(name, node.lineno, node.name.replace("_", " "), is_documentation=False)


def passages_of_page(path: Path) -> Iterator[Passage]:
    """Yield the paragraphs, list items and table cells of a page, without code blocks and generated tables."""
    text = path.read_text(encoding="utf-8")
    for hidden in (_GENERATED, _FENCE):
        text = hidden.sub(lambda match: "\n" * match[0].count("\n"), text)
    yield from _paragraphs(str(path.relative_to(ROOT)), 1, text)


def _docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Yield texts that stand alone as a statement: docstrings, and the descriptions below fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value


def _paragraphs(path: str, first: int, text: str) -> Iterator[Passage]:
    """Yield the blocks of a text; list items, rows and cells of tables and arguments are blocks of their own."""
    block: list[str] = []
    begin = first
    for number, line in enumerate([*text.splitlines(), ""], start=first):
        is_new = bool(_ITEM.match(line) or _ROW.search(line) or re.match(r"^ {4,}\w+(?: \(.*\))?: ", line))
        if block and (is_new or not line.strip() or line.startswith("#") or _SECTION.match(line)):
            yield from _cells(path, begin, block)
            block = []
        if line.strip() and not line.startswith("#") and not _SECTION.match(line):
            begin = begin if block else number
            block.append(line.strip())
    if block:
        yield from _cells(path, begin, block)


def _cells(path: str, line: int, block: list[str]) -> Iterator[Passage]:
    text = " ".join(block)
    parts = re.split(r"(?<!\\)\|", text) if text.startswith("|") else [text]
    for part in parts:
        if any(map(str.isalpha, part)):
            yield Passage(path, line, part, is_documentation=True)
