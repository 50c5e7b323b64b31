"""Agents that write a report about the documents in `report` together.

    loom run report.jsonl --agents report.py

The task in `report.jsonl` has a plan: three documents are read concurrently, the findings are compared, and the editor
who won the whole task writes the report. The agents are plain functions without network or keys. They count words and
figures where an `Agent` would use a language model.
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
    """The findings of one document."""

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
    """Return the figures of all documents in comparison."""
    documents = findings_in(job)
    if len(documents) < 2:  # noqa: PLR2004 - a comparison needs two
        raise AgentFailed("give me the findings of at least two documents")
    lines = []
    for name in documents[0].figures:
        ranked = sorted(
            (document for document in documents if name in document.figures),
            key=lambda document: -document.figures[name],
        )
        lines.append(f"{name}: " + ", ".join(f"{document.title} {document.figures[name]:,}" for document in ranked))
    for name, above, below in RATIOS:
        known = [document for document in documents if document.figures.get(below) and above in document.figures]
        ratios = sorted(
            ((document.figures[above] / document.figures[below], document.title) for document in known), reverse=True
        )
        lines.append(f"{name}: " + ", ".join(f"{title} {ratio:.2f}" for ratio, title in ratios))
    return "\n".join(lines)


def write(job: RunRequest) -> str:
    """Return the report, from the findings and their comparison."""
    documents = findings_in(job)
    compared = [output for name, output in job.inputs.items() if name.startswith("compare")]
    if not documents or not compared:
        raise AgentFailed("an editor needs findings and a comparison")
    whole = sum(document.figures.get("Visitors", 0) for document in documents)
    words = sum(document.words for document in documents)
    parts = [
        f"{len(documents)} libraries, {whole:,} visitors; {words} words read",
        *compared,
        "What they ask for:",
        *(f"- {document.title}: {document.wish}" for document in documents if document.wish),
    ]
    return "\n".join(parts)


def findings_in(job: RunRequest) -> list[Findings]:
    """Return the findings among a job's inputs, in the order of the plan."""
    return [msgspec.json.decode(output, type=Findings) for output in job.inputs.values() if output.startswith("{")]


def specialist(name: str, domain: str, work: object) -> AgentNode:
    """Return a node that accepts tasks of one domain."""
    return AgentNode(id=name, domains=[domain], capabilities=CapabilityProfile(scores={domain: 0.9}), agent=work)


nodes = [
    specialist("reader-1", "reading", read),
    specialist("reader-2", "reading", read),
    specialist("analyst", "comparison", compare),
    specialist("editor", "report", write),
]
