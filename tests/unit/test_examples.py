"""The examples give the documented results on the supplied files."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from loom.agents.llm.agent import Agent
from loom.schemas.checks.ad import parse_ad
from loom.schemas.errors import AgentFailed
from loom.schemas.run import RunRequest
from loom.schemas.task import TaskAd

EXAMPLES = Path(__file__).parents[2] / "examples"
TASKS = [parse_ad(line) for line in (EXAMPLES / "tasks.jsonl").read_bytes().splitlines()]


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`examples/agents.py`, loaded without a model."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return load(monkeypatch)


def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_agents", EXAMPLES / "agents.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in [name for name in sys.modules if name.partition(".")[0] == "analysis"]:
        monkeypatch.delitem(sys.modules, name)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def inputs(agents: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new folder in place of examples/inputs."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    monkeypatch.setattr(sys.modules["analysis.input_files"], "INPUTS", folder.resolve())
    return folder


def job(file: str, **context: str) -> RunRequest:
    return RunRequest(task_id="t", description="look at it", context={"file": file, **context})


# -- data ------------------------------------------------------------------------------------------------------------


def test_a_tables_overview_gives_types_ranges_means_and_gaps(agents: ModuleType) -> None:
    lines = agents.quick_data(job("sales.csv")).splitlines()
    columns = dict(line.split(maxsplit=1) for line in lines[1:])

    assert lines[0] == "sales.csv: 240 rows, 10 columns"
    assert columns["date"] == "date    2024-01-03 to 2025-01-01"
    assert columns["units"] == "number  min 2, mean 12.36, max 61"
    assert columns["rating"] == "number  min 1, mean 3.94, max 5, 29 missing"
    assert columns["region"] == "text    4 different: south 72, west 68, north 64"


def test_a_tables_report_ranks_correlations_and_groups(agents: ModuleType) -> None:
    report = agents.thorough_data(job("sales.csv"))

    assert agents.quick_data(job("sales.csv")) in report
    assert "unit_price and revenue: +0.76" in report
    assert "revenue by region (total, share, mean)\n  south: 30,905.81, 35%, 429.25\n" in report
    assert "by order_id" not in report


def test_the_context_chooses_the_measured_quantity(agents: ModuleType) -> None:
    assert "rain_mm by wind_from (total, share, mean)\n  N: 31.10, 46%, 7.78" in agents.thorough_data(
        job("weather.csv", measure="rain_mm")
    )
    with pytest.raises(AgentFailed, match="no number column sunshine; there are high_c"):
        agents.thorough_data(job("weather.csv", measure="sunshine"))


@pytest.mark.parametrize(
    ("table", "complaint"), [("", "no rows"), ("a,b\n", "no rows"), ("a,b\n1,2\n3\n", "row 3: 1 cells instead of 2")]
)
def test_an_invalid_table_is_refused(agents: ModuleType, inputs: Path, table: str, complaint: str) -> None:
    (inputs / "t.csv").write_text(table)
    with pytest.raises(AgentFailed, match=complaint):
        agents.quick_data(job("t.csv"))


def test_cells_that_are_not_finite_numbers_make_a_text_column(agents: ModuleType, inputs: Path) -> None:
    (inputs / "t.csv").write_text("a,b\n1,nan\n2,3\n")

    assert "  b  text    2 different" in agents.thorough_data(job("t.csv"))


def test_a_table_without_numbers_still_gets_a_report(agents: ModuleType, inputs: Path) -> None:
    (inputs / "t.csv").write_text("name\nann\nbob\n")

    assert agents.thorough_data(job("t.csv")) == "t.csv: 2 rows, 1 columns\n  name  text    2 different"


# -- code ------------------------------------------------------------------------------------------------------------


def test_an_outline_lists_imports_classes_and_functions(agents: ModuleType) -> None:
    assert agents.quick_code(job("retry.py")).splitlines() == [
        "retry.py: 43 lines, 1 classes, 5 functions",
        "imports: asyncio, functools, random, time",
        "  class GaveUp (line 7)",
        "  def backoff (line 11, 3 lines)",
        "  def retry (line 16, 15 lines)",
        "  def retry.<locals>.decorate (line 17, 12 lines)",
        "  def retry.<locals>.decorate.<locals>.call (line 19, 8 lines)",
        "  def retry_async (line 33, 11 lines)",
    ]


def test_a_review_finds_the_complex_the_long_and_the_undocumented(agents: ModuleType) -> None:
    review = agents.thorough_code(job("tokenizer.py"))

    assert agents.quick_code(job("tokenizer.py")) in review
    assert "the highest:\n  to_postfix: 13\n" in review
    assert "longest function: to_postfix, 23 lines" in review
    assert review.endswith("without a docstring: to_postfix")
    assert agents.thorough_code(job("retry.py")).endswith("without a docstring: the module, retry, GaveUp")


def test_complexity_counts_every_branch_but_not_those_of_functions_inside(agents: ModuleType, inputs: Path) -> None:
    (inputs / "t.py").write_text(
        "def outer(x):\n"
        "    if x and x > 1 or not x:\n"  # 1 + 2
        "        return [y for y in x if y]\n"  # 1 + 1
        "    def inner(z):\n"
        "        return 1 if z else 2\n"
        "    return inner\n"
    )
    review = agents.thorough_code(job("t.py"))

    assert "  outer: 6\n  outer.<locals>.inner: 2\n" in review


def test_text_that_is_not_python_is_refused_with_its_line(agents: ModuleType, inputs: Path) -> None:
    (inputs / "t.py").write_text("x = 1\ndef (\n")
    with pytest.raises(AgentFailed, match=r"t\.py, line 2: invalid syntax"):
        agents.quick_code(job("t.py"))


# -- writing ---------------------------------------------------------------------------------------------------------


def test_a_texts_keywords_and_readability(agents: ModuleType) -> None:
    assert agents.quick_writing(job("rivers.txt")).splitlines() == [
        "rivers.txt: 415 words, 24 sentences",
        "keywords: river (9), fields (4), room (4), water (4), beside (3), straight (3), faster (3), meadows (3)",
        "readability: plain, Flesch reading ease 64, 17 words per sentence",
    ]


@pytest.mark.parametrize("file", ["rivers.txt", "lighthouse.txt", "meeting.txt", "tea-zh.txt"])
def test_a_summary_is_made_of_the_texts_own_sentences_in_their_order(agents: ModuleType, file: str) -> None:
    text = (EXAMPLES / "inputs" / file).read_text(encoding="utf-8")
    summary = agents.thorough_writing(job(file))
    sentences = [line.removeprefix("  - ") for line in summary.splitlines() if line.startswith("  - ")]

    assert len(sentences) == 3
    assert [text.index(sentence) for sentence in sentences] == sorted(text.index(sentence) for sentence in sentences)


def test_a_summary_prefers_the_topic_of_the_text(agents: ModuleType) -> None:
    assert "Where a river has room, a flood rises more slowly" in agents.thorough_writing(job("rivers.txt"))


def test_chinese_is_read_as_chinese(agents: ModuleType) -> None:
    assert agents.quick_writing(job("tea-zh.txt")).startswith(
        "tea-zh.txt: 311 characters, 18 sentences\nkeywords: 茶叶 (6), 味道 (5), "
    )


def test_points_inside_a_number_end_no_sentence(agents: ModuleType) -> None:
    assert sys.modules["analysis.texts"].sentences_of("It costs 2.50 a piece. Really?") == [
        "It costs 2.50 a piece.",
        "Really?",
    ]


# -- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["../agents.py", "/etc/passwd", "a/../../agents.py", "", "missing.csv", ".", "a\0b"])
def test_only_files_in_the_inputs_folder_are_read(agents: ModuleType, file: str) -> None:
    for work in (agents.quick_data, agents.thorough_data, agents.quick_code, agents.quick_writing):
        with pytest.raises((AgentFailed, ValueError), match=r"inputs folder|name the input|null"):
            work(job(file))


def test_a_link_out_of_the_inputs_folder_is_not_followed(agents: ModuleType, inputs: Path) -> None:
    (inputs / "link.py").symlink_to(EXAMPLES / "agents.py")
    with pytest.raises(AgentFailed, match="outside the inputs folder"):
        agents.quick_code(job("link.py"))


def test_a_job_without_a_file_is_refused_with_the_way_to_name_one(agents: ModuleType) -> None:
    with pytest.raises(AgentFailed, match="context"):
        agents.quick_data(RunRequest(task_id="t", description="look"))


def test_the_tools_read_no_other_files_either(agents: ModuleType) -> None:
    for tool in (agents.table_report, agents.code_review, agents.text_summary):
        with pytest.raises(AgentFailed, match="outside the inputs folder"):
            tool("../agents.py")


# -- tasks and nodes -------------------------------------------------------------------------------------------------


def test_the_tasks_have_three_domains_and_some_name_none() -> None:
    assert len(TASKS) >= 12
    assert len({ad.task_id for ad in TASKS}) == len(TASKS)
    assert {ad.domain for ad in TASKS} == {"data", "code", "writing", ""}


@pytest.mark.parametrize("ad", TASKS, ids=lambda ad: ad.task_id)
def test_the_thorough_agent_of_each_domain_gives_accepted_answers(agents: ModuleType, ad: TaskAd) -> None:
    work = {".csv": agents.thorough_data, ".py": agents.thorough_code, ".txt": agents.thorough_writing}
    content = work[Path(ad.context["file"]).suffix](
        RunRequest(task_id=ad.task_id, description=ad.description, context=ad.context)
    )

    assert len(content.splitlines()) > 3
    if ad.accept:
        assert all(text in content for text in ad.accept.contains)


def test_two_nodes_a_domain_work_without_a_model(agents: ModuleType) -> None:
    assert {node.id: node.capabilities.scores for node in agents.nodes} == {
        f"{domain}-{kind}": {domain: claim}
        for domain in ("data", "code", "writing")
        for kind, claim in (("quick", 0.6), ("thorough", 0.85))
    }


def test_a_configured_model_gets_the_same_functions_as_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    nodes = {node.id: node.agent for node in load(monkeypatch).nodes}

    assert all(isinstance(agent, Agent) for agent in nodes.values())
    assert {name: agent.tools for name, agent in nodes.items()} == {
        "data-model": ("table_overview", "table_report"),
        "code-model": ("code_outline", "code_review"),
        "writing-model": ("text_keywords", "text_summary"),
    }


def test_loading_from_a_copy_finds_the_inputs_next_to_it(
    tmp_path: Path, agents: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "copy")
    monkeypatch.setattr(sys.modules[__name__], "EXAMPLES", tmp_path / "copy")

    assert load(monkeypatch).quick_data(job("weather.csv")) == agents.quick_data(job("weather.csv"))
