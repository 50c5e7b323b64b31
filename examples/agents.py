"""Agents that do real work on the files in `inputs`: tables, Python sources and texts.

    loom run tasks.jsonl --agents agents.py        or        loom host run agents.py

They are plain functions and need neither network nor keys. Each domain has a quick one and a thorough one that
claims more, so there is something to choose. With OPENAI_API_KEY or OPENAI_BASE_URL set, language models bid
instead and have the same functions as tools. A task names its file in its context: `{"file": "sales.csv"}`.
"""

import ast
import csv
import math
import os
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import combinations
from pathlib import Path

from loom.schemas.errors import AgentFailed
from loom.schemas.run import RunRequest
from loom.types import AgentNode, CapabilityProfile

INPUTS = Path(__file__).resolve().parent / "inputs"
MAX_BYTES = 2_000_000


def read_input(file: str) -> str:
    """Return the text of a file in `inputs`.

    Raises:
        AgentFailed: It is outside that folder, not there, or larger than 2 MB.
    """
    path = (INPUTS / file).resolve()
    if not path.is_relative_to(INPUTS):
        raise AgentFailed(f"{file} is outside the inputs folder")
    if not path.is_file():
        raise AgentFailed(f"there is no {file} in the inputs folder")
    if path.stat().st_size > MAX_BYTES:
        raise AgentFailed(f"{file} is larger than {MAX_BYTES} bytes")
    return path.read_text(encoding="utf-8")


def file_of(job: RunRequest) -> str:
    """Return the file a job names in its context.

    Raises:
        AgentFailed: It names none.
    """
    file = job.context.get("file")
    if not isinstance(file, str) or not file:
        raise AgentFailed('name the input in the context of the task: {"file": "sales.csv"}')
    return file


# -- data ------------------------------------------------------------------------------------------------------------

MOST_GROUPS = 12
"""Texts with more different values than this are names, not groups."""


class Column:
    """One column of a table: its cells as text, and as numbers where all that are filled in are numbers."""

    def __init__(self, name: str, cells: Sequence[str]) -> None:
        self.name = name
        self.cells = cells
        self.filled = [cell for cell in cells if cell]
        self.missing = len(cells) - len(self.filled)
        numbers = [_number(cell) for cell in cells]
        self.numbers = numbers if len(self.filled) == sum(n is not None for n in numbers) > 0 else []
        self.is_date = bool(self.filled) and not self.numbers and all(_is_date(cell) for cell in self.filled)

    @property
    def values(self) -> list[float]:
        """The numbers that are filled in."""
        return [number for number in self.numbers if number is not None]

    @property
    def is_group(self) -> bool:
        """Whether rows can sensibly be grouped by it."""
        return not self.numbers and not self.is_date and 1 < len(set(self.filled)) <= MOST_GROUPS

    def describe(self) -> str:
        """Return its type and extent in one line."""
        values = self.values
        if values:
            facts = f"number  min {min(values):g}, mean {statistics.fmean(values):.2f}, max {max(values):g}"
        elif self.is_date:
            facts = f"date    {min(self.filled)} to {max(self.filled)}"
        else:
            counts = Counter(self.filled)
            common = ", ".join(f"{value} {count}" for value, count in counts.most_common(3) if count > 1)
            facts = f"text    {len(counts)} different" + (f": {common}" if common else "")
        return facts + (f", {self.missing} missing" if self.missing else "")


def read_table(file: str) -> list[Column]:
    """Return the columns of a CSV file with a header.

    Raises:
        AgentFailed: It cannot be read, has no rows, or a row is not as long as the header.
    """
    header, *rows = list(csv.reader(read_input(file).splitlines())) or [[]]
    if not rows:
        raise AgentFailed(f"{file} has no rows")
    for line, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise AgentFailed(f"{file}, row {line}: {len(row)} cells instead of {len(header)}")
    return [Column(name, [row[index].strip() for row in rows]) for index, name in enumerate(header)]


def table_overview(file: str) -> str:
    """Describe every column of a CSV file: type, range, mean, common values, missing cells."""
    columns = read_table(file)
    width = max(len(column.name) for column in columns)
    lines = [f"{file}: {len(columns[0].cells)} rows, {len(columns)} columns"]
    return "\n".join([*lines, *(f"  {column.name:<{width}}  {column.describe()}" for column in columns)])


def table_report(file: str, measure: str = "") -> str:
    """Describe a CSV file with spread, correlations, and the groups with the most of `measure`.

    Without `measure` it is the number column with the largest total.
    """
    columns = read_table(file)
    numeric = [column for column in columns if column.numbers]
    lines = [table_overview(file)]
    if not numeric:
        return lines[0]
    lines += ["", "Spread (median, standard deviation)"]
    lines += [
        f"  {column.name}: {statistics.median(column.values):g}, {statistics.pstdev(column.values):.2f}"
        for column in numeric
    ]
    lines += ["", "Strongest correlations", *_correlations(numeric)]
    chosen = _choose(numeric, measure)
    for column in columns:
        if column.is_group:
            lines += ["", f"{chosen.name} by {column.name} (total, share, mean)", *_groups(column, chosen)]
    return "\n".join(lines)


def _choose(numeric: Sequence[Column], measure: str) -> Column:
    if not measure:
        return max(numeric, key=lambda column: sum(column.values))
    for column in numeric:
        if column.name == measure:
            return column
    raise AgentFailed(f"there is no number column {measure}; there are {', '.join(column.name for column in numeric)}")


def _correlations(numeric: Sequence[Column]) -> list[str]:
    found = []
    for one, other in combinations(numeric, 2):
        pairs = [(x, y) for x, y in zip(one.numbers, other.numbers, strict=True) if x is not None and y is not None]
        xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
        if len(set(xs)) > 1 and len(set(ys)) > 1:
            found.append((statistics.correlation(xs, ys), one.name, other.name))
    found.sort(key=lambda item: -abs(item[0]))
    return [f"  {one} and {other}: {r:+.2f}" for r, one, other in found[:3]] or ["  none"]


def _groups(by: Column, measure: Column) -> list[str]:
    members: dict[str, list[float]] = defaultdict(list)
    for group, number in zip(by.cells, measure.numbers, strict=True):
        if number is not None:
            members[group or "(missing)"].append(number)
    ranked = sorted(members.items(), key=lambda item: -sum(item[1]))
    whole = sum(measure.values)
    return [
        f"  {group}: {sum(numbers):,.2f}, {sum(numbers) / whole if whole else 0:.0%}, {statistics.fmean(numbers):,.2f}"
        for group, numbers in ranked[:4]
    ]


def _number(cell: str) -> float | None:
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _is_date(cell: str) -> bool:
    try:
        date.fromisoformat(cell)
    except ValueError:
        return False
    return True


# -- code ------------------------------------------------------------------------------------------------------------

Function = ast.FunctionDef | ast.AsyncFunctionDef

BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.comprehension, ast.match_case)
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def read_source(file: str) -> ast.Module:
    """Return the syntax tree of a Python file.

    Raises:
        AgentFailed: It cannot be read, or is not Python.
    """
    try:
        return ast.parse(read_input(file), filename=file)
    except SyntaxError as error:
        raise AgentFailed(f"{file}, line {error.lineno}: {error.msg}") from error


def code_outline(file: str) -> str:
    """List what a Python file imports, and its classes and functions with their lines."""
    tree = read_source(file)
    functions = list(_functions(tree))
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    lines = [
        f"{file}: {len(read_input(file).splitlines())} lines, {len(classes)} classes, {len(functions)} functions",
        f"imports: {', '.join(_imports(tree)) or 'nothing'}",
    ]
    lines += [f"  class {node.name} (line {node.lineno})" for node in classes]
    lines += [f"  def {name} (line {node.lineno}, {_length(node)} lines)" for name, node in functions]
    return "\n".join(lines)


def code_review(file: str) -> str:
    """Outline a Python file and judge it: cyclomatic complexity, longest function, missing docstrings."""
    tree = read_source(file)
    functions = list(_functions(tree))
    lines = [code_outline(file)]
    if functions:
        ranked = sorted(functions, key=lambda item: -complexity(item[1]))
        longest, node = max(functions, key=lambda item: _length(item[1]))
        mean = statistics.fmean(complexity(each) for _, each in functions)
        lines += ["", f"cyclomatic complexity: {mean:.1f} on average; the highest:"]
        lines += [f"  {name}: {complexity(each)}" for name, each in ranked[:3]]
        lines.append(f"longest function: {longest}, {_length(node)} lines")
    bare = [name for name, each in functions if _is_public(name) and not ast.get_docstring(each)]
    bare += [each.name for each in ast.walk(tree) if isinstance(each, ast.ClassDef) and not ast.get_docstring(each)]
    if not ast.get_docstring(tree):
        bare.insert(0, "the module")
    lines.append(f"without a docstring: {', '.join(bare) or 'nothing public'}")
    return "\n".join(lines)


def complexity(function: Function) -> int:
    """Return the number of independent paths through a function (McCabe); functions inside count for themselves."""
    paths = 1
    for node in _own_nodes(function):
        paths += isinstance(node, BRANCHES)
        paths += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
        paths += len(node.ifs) if isinstance(node, ast.comprehension) else 0
    return paths


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, SCOPES):
            yield child
            yield from _own_nodes(child)


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Yield every function under `node` with its qualified name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, Function):
            yield prefix + child.name, child
            yield from _functions(child, f"{prefix}{child.name}.<locals>.")
        else:
            yield from _functions(child, prefix)


def _imports(tree: ast.Module) -> list[str]:
    names = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."])
    }
    return sorted(names)


def _length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def _is_public(name: str) -> bool:
    return "<locals>" not in name and not name.rpartition(".")[2].startswith("_")


# -- writing ---------------------------------------------------------------------------------------------------------

COMMON = frozenset(
    """
    a about after again all also although always am an and another any are as ask asked at away be because become
    been before being below between both but by can cannot could did do does down each either few first for from
    get gives had has have he her his how i if in into is it its itself just less like made make many may more
    most much must no nobody not now of off on once one only or other our out over own same says she should so
    some such than that the their them then there these they this those three through to today too two under until
    up us used very was we well were what when where which while who whose why will with without would you your
    """.split()  # noqa: SIM905  # a list of so many literals is no list to read
)
CJK_GLUE = "的了在是就和也都很把不用会到要一有里以下同种么没去又个让为这那其最多少更比时候们自己可得因所第"
"""Characters that hold Chinese sentences together and rarely belong to a keyword."""
CJK_RUN = re.compile(rf"[^\W\d_a-zA-Z{CJK_GLUE}]{{2,}}")
CJK = re.compile(r"[\u3400-\u9fff]")
STOP = r".!?\u3002\uff01\uff1f"
SENTENCE = re.compile(rf"[^{STOP}\n]+(?:[.!?](?!\s|$)[^{STOP}\n]*)*[{STOP}]+")
KEY_SENTENCES = 3


def sentences_of(text: str) -> list[str]:
    """Return the sentences of an English or Chinese text."""
    return [found.strip() for found in SENTENCE.findall(text)]


def words_of(text: str) -> list[str]:
    """Return the words that carry meaning, in lower case; of Chinese the pairs of characters."""
    if _is_chinese(text):
        runs = [run for run in CJK_RUN.findall(text) if CJK.match(run)]
        return [run[index : index + 2] for run in runs for index in range(len(run) - 1)]
    return [word for word in re.findall(r"[a-z]+", text.casefold()) if len(word) > 2 and word not in COMMON]  # noqa: PLR2004


def text_keywords(file: str) -> str:
    """Count a text's words and sentences, and name its keywords and how easy it is to read."""
    text = read_input(file)
    sentences = sentences_of(text)
    if not sentences:
        raise AgentFailed(f"{file} holds no sentence")
    chinese = _is_chinese(text)
    size = len(CJK.findall(text)) if chinese else len(re.findall(r"[A-Za-z']+", text))
    common = [f"{word} ({count})" for word, count in Counter(words_of(text)).most_common(8) if count > 1]
    return "\n".join(
        [
            f"{file}: {size} {'characters' if chinese else 'words'}, {len(sentences)} sentences",
            f"keywords: {', '.join(common) or 'none occurs twice'}",
            f"readability: {_readability(text, size, len(sentences))}",
        ]
    )


def text_summary(file: str) -> str:
    """Summarise a text by its key sentences, those with the most frequent words, and name keywords and readability."""
    text = read_input(file)
    weights = Counter(words_of(text))
    sentences = sentences_of(text)

    def weight(index: int) -> float:
        words = set(words_of(sentences[index]))
        return sum(weights[word] for word in words) / math.sqrt(len(words)) if words else 0.0

    best = sorted(range(len(sentences)), key=weight, reverse=True)[:KEY_SENTENCES]
    return "\n".join([text_keywords(file), "key sentences:", *(f"  - {sentences[index]}" for index in sorted(best))])


def _is_chinese(text: str) -> bool:
    return len(CJK.findall(text)) > len(re.findall(r"[A-Za-z]", text))


def _readability(text: str, size: int, sentences: int) -> str:
    per_sentence = size / sentences
    if _is_chinese(text):
        return f"{per_sentence:.0f} characters per sentence"
    vowel_groups = sum(max(1, len(re.findall(r"[aeiouy]+", word))) for word in re.findall(r"[a-z']+", text.casefold()))
    ease = 206.835 - 1.015 * per_sentence - 84.6 * vowel_groups / size  # Flesch reading ease
    level = "easy" if ease >= 70 else "plain" if ease >= 50 else "difficult"  # noqa: PLR2004
    return f"{level}, Flesch reading ease {ease:.0f}, {per_sentence:.0f} words per sentence"


# -- the nodes -------------------------------------------------------------------------------------------------------


def quick_data(job: RunRequest) -> str:
    """Describe the columns of a table."""
    return table_overview(file_of(job))


def thorough_data(job: RunRequest) -> str:
    """Describe a table with correlations and groups; the context may name the `measure`."""
    return table_report(file_of(job), str(job.context.get("measure", "")))


def quick_code(job: RunRequest) -> str:
    """Outline a Python source."""
    return code_outline(file_of(job))


def thorough_code(job: RunRequest) -> str:
    """Outline a Python source and judge it."""
    return code_review(file_of(job))


def quick_writing(job: RunRequest) -> str:
    """Name the keywords of a text."""
    return text_keywords(file_of(job))


def thorough_writing(job: RunRequest) -> str:
    """Summarise a text."""
    return text_summary(file_of(job))


def offline_nodes() -> list[AgentNode]:
    """Return two nodes per domain that need nothing but the files."""
    staff = {"data": (quick_data, thorough_data), "code": (quick_code, thorough_code)}
    staff["writing"] = (quick_writing, thorough_writing)
    return [
        AgentNode(id=f"{domain}-{kind}", capabilities=CapabilityProfile(scores={domain: claim}), agent=function)
        for domain, functions in staff.items()
        for kind, claim, function in zip(("quick", "thorough"), (0.6, 0.85), functions, strict=True)
    ]


def model_nodes() -> list[AgentNode]:
    """Return one language model per domain, with that domain's functions as tools."""
    from loom import Agent, AgentConfig, OpenAIProvider  # noqa: PLC0415  # only where a model is configured

    config = AgentConfig(model=os.environ.get("LOOM_MODEL") or AgentConfig.model, max_steps=5)
    provider = OpenAIProvider(config)
    tools = {
        "data": (table_overview, table_report),
        "code": (code_outline, code_review),
        "writing": (text_keywords, text_summary),
    }
    prompt = (
        "You answer tasks about one file. The context names it; look at it with your tools before you answer. "
        "Answer in plain text with the numbers the tools gave, in the language of the task."
    )
    return [
        AgentNode(
            id=f"{domain}-model",
            capabilities=CapabilityProfile(scores={domain: 0.9}),
            agent=Agent(provider, config, system_prompt=prompt, tools=functions, name=f"{domain}-model"),
        )
        for domain, functions in tools.items()
    ]


nodes = model_nodes() if os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL") else offline_nodes()
