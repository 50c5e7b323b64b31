"""The document of loom-agent 0.6: its snippets run as written."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from loom import Agent, LoopContext, OpenAIProvider, UserMessage

OWN_COPY = Path(__file__).parents[1] / "data" / "runtime.md"
SHARED = Path(__file__).parents[3] / "shared" / "seed" / "runtime.md"


def snippets() -> dict[str, list[str]]:
    """heading -> its Python blocks, byte for byte."""
    text = (SHARED if SHARED.exists() else OWN_COPY).read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        found[heading] = re.findall(r"^```python\n(.*?)^```", body, flags=re.MULTILINE | re.DOTALL)
    return found


async def run(source: str, scope: dict[str, Any]) -> None:
    """Run a snippet, which may await at its top level."""
    code = compile(source, "runtime.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    outcome = eval(code, scope)
    if inspect.isawaitable(outcome):
        await outcome


async def test_the_runtime_snippets_run_as_written(
    provider: OpenAIProvider, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NATS_URL", raising=False)
    blocks = snippets()
    scope: dict[str, Any] = {"provider": provider}
    for source in [*blocks["Runtime — 集群编排"], *blocks["提交任务"], *blocks["健康检查"]]:
        await run(source, scope)

    sorting, sales, *reports = capsys.readouterr().out.splitlines()
    assert "实现排序算法" in sorting
    assert "分析销售数据" in sales
    assert [line.split(": ")[1] for line in reports] == ["healthy", "healthy"]
    coder, analyst = scope["rt"].cluster.nodes
    assert [line.split(": ")[0] for line in reports] == [coder.id, analyst.id]
    await provider.aclose()


async def test_the_amoeba_snippet_runs_as_written(
    provider: OpenAIProvider, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NATS_URL", raising=False)
    [source] = snippets()["AmoebaLoop — 6 阶段自组织循环"]
    ctx = LoopContext(messages=[UserMessage(content="写一个排序函数")])
    await run(source, {"provider": provider, "agent": Agent(provider), "ctx": ctx})

    answer, done = capsys.readouterr().out.splitlines()
    assert "写一个排序函数" in answer
    assert done == "完成: steps=1"
    await provider.aclose()


def test_the_copy_kept_here_equals_the_original_document() -> None:
    if not SHARED.exists():
        pytest.skip("the document of loom-agent 0.6 is not next to this checkout")
    assert OWN_COPY.read_bytes() == SHARED.read_bytes()
