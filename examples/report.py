"""Agents that write a report over the documents in `report`, each doing its part.

    loom run report.jsonl --agents report.py

The task of `report.jsonl` brings its own plan: three documents are read side by side, what was found is compared, and
the editor who won the whole task puts all of it together. Plain functions, without network or keys: what a language
model would do with an `Agent`, they do with counting.
"""

import re
from pathlib import Path

import msgspec

from loom.schemas.errors import AgentFailed
from loom.schemas.run import RunRequest
from loom.types import AgentNode, CapabilityProfile

DOCUMENTS = Path(__file__).resolve().parent / "report"
FILE = re.compile(r"\b[\w-]+\.txt\b")
FIGURE = re.compile(r"^([A-Z][\w ]*): ([\d,]+)$", re.MULTILINE)
WISH = re.compile(r"[^.]*\b(?:lack|want|asked for)\b[^.]*\.")
RATIOS = (("loans per visitor", "Loans", "Visitors"), ("cost per visitor", "Cost", "Visitors"))


class Findings(msgspec.Struct):
    """What one document says."""

    title: str
    words: int
    figures: dict[str, int]
    wish: str


def read(job: RunRequest) -> str:
    """Return the findings of the document that the description names, as JSON."""
    named = FILE.search(job.description)
    if named is None:
        raise AgentFailed("the description names no .txt file")
    path = DOCUMENTS / named.group()
    if not path.is_file():
        raise AgentFailed(f"there is no {named.group()} in the report folder")
    text = path.read_text(encoding="utf-8")
    title, _, body = text.partition("\n")
    wish = WISH.search(body)
    findings = Findings(
        title=title.partition(",")[0],
        words=len(text.split()),
        figures={name: int(number.replace(",", "")) for name, number in FIGURE.findall(body)},
        wish=" ".join(wish.group().split()) if wish else "",
    )
    return msgspec.json.encode(findings).decode()


def compare(job: RunRequest) -> str:
    """Return what the documents read before have in common, side by side."""
    documents = findings_in(job)
    if len(documents) < 2:  # noqa: PLR2004 - one has nothing to be compared with
        raise AgentFailed("give me the findings of at least two documents")
    lines = []
    for name in documents[0].figures:
        ranked = sorted((each for each in documents if name in each.figures), key=lambda each: -each.figures[name])
        lines.append(f"{name}: " + ", ".join(f"{each.title} {each.figures[name]:,}" for each in ranked))
    for name, above, below in RATIOS:
        known = [each for each in documents if each.figures.get(below) and above in each.figures]
        ratios = sorted(((each.figures[above] / each.figures[below], each.title) for each in known), reverse=True)
        lines.append(f"{name}: " + ", ".join(f"{title} {ratio:.2f}" for ratio, title in ratios))
    return "\n".join(lines)


def write(job: RunRequest) -> str:
    """Return the whole report, from the findings and what compared them."""
    documents = findings_in(job)
    compared = [output for name, output in job.inputs.items() if name.startswith("compare")]
    if not documents or not compared:
        raise AgentFailed("an editor needs findings and a comparison")
    whole = sum(each.figures.get("Visitors", 0) for each in documents)
    words = sum(each.words for each in documents)
    parts = [
        f"{len(documents)} libraries, {whole:,} visitors; {words} words read",
        *compared,
        "What they ask for:",
        *(f"- {each.title}: {each.wish}" for each in documents if each.wish),
    ]
    return "\n".join(parts)


def findings_in(job: RunRequest) -> list[Findings]:
    """Return the findings among a job's inputs, in the order of the plan."""
    return [msgspec.json.decode(output, type=Findings) for output in job.inputs.values() if output.startswith("{")]


def specialist(name: str, domain: str, work: object) -> AgentNode:
    """Return a node that takes tasks of one domain."""
    return AgentNode(id=name, domains=[domain], capabilities=CapabilityProfile(scores={domain: 0.9}), agent=work)


nodes = [
    specialist("reader-1", "reading", read),
    specialist("reader-2", "reading", read),
    specialist("analyst", "comparison", compare),
    specialist("editor", "report", write),
]
