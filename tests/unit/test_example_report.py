"""The agents of examples/report.py: each does its part on the supplied documents."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from loom.schemas.checks.ad import parse_ad
from loom.schemas.errors import AgentFailed
from loom.schemas.plan import parse_plan
from loom.schemas.run import RunRequest

EXAMPLES = Path(__file__).parents[2] / "examples"
[AD] = [parse_ad(line) for line in (EXAMPLES / "report.jsonl").read_bytes().splitlines()]
PLAN = parse_plan(json.dumps(AD.context["plan"]))


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_report", EXAMPLES / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def job(description: str, **inputs: str) -> RunRequest:
    return RunRequest(task_id="t", description=description, inputs=inputs)


def test_a_document_gives_its_figures_and_its_wish(report: ModuleType) -> None:
    findings = json.loads(report.read(job("Read hills.txt, please.")))

    assert findings["title"] == "Hill Library"
    assert findings["figures"] == {
        "Visitors": 15930,
        "Loans": 39270,
        "Events": 18,
        "Opening hours": 1310,
        "Cost": 84300,
    }
    assert findings["wish"] == "The villages beyond the pass have asked for a second one."


@pytest.mark.parametrize("file", ["../report.py", "missing.txt", "a/../../hills.md", ""])
def test_only_documents_of_the_folder_are_read(report: ModuleType, file: str) -> None:
    with pytest.raises(AgentFailed, match=r"there is no missing|names no \.txt"):
        report.read(job(f"Read {file}"))


def test_the_plan_in_order_gives_an_accepted_report(report: ModuleType) -> None:
    work = {"reading": report.read, "comparison": report.compare, "report": report.write}
    outputs: dict[str, str] = {}
    for part in PLAN:
        outputs[part.id] = work[part.domain](
            job(part.description, **{name: outputs[name] for name in part.dependencies})
        )
    written = report.write(job(AD.description, **outputs))

    assert AD.accept is not None
    assert all(text in written for text in AD.accept.contains)
    assert "loans per visitor: Hill Library 2.47, Harbour Library 1.28, Market Library 0.77" in written
    assert written.startswith("3 libraries, 155,700 visitors")


def test_each_domain_of_the_plan_has_a_specialist_and_wrong_work_is_refused(report: ModuleType) -> None:
    claims = {name for node in report.nodes for name, score in node.capabilities.scores.items() if score > 0.5}

    assert {AD.domain, *(part.domain for part in PLAN)} == claims
    for work in (report.compare, report.write):
        with pytest.raises(AgentFailed, match=r"need|give me"):
            work(job("do it"))
