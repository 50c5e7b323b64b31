"""Agents that do real work on the files in `inputs`: tables, Python sources and texts.

    loom run tasks.jsonl --agents agents.py        or        loom host run agents.py

The agents are plain functions and need neither network nor keys. Each domain has a quick agent, and a thorough one with
a higher self-rating, so that the auction has a choice. With OPENAI_API_KEY or OPENAI_BASE_URL set, language models bid
instead, and have the same functions as tools. A task names its file in its context: `{"file": "sales.csv"}`.
"""

import os

from analysis.sources import code_outline, code_review
from analysis.tables import table_overview, table_report
from analysis.texts import text_keywords, text_summary

from loom.schemas.errors import AgentFailed
from loom.schemas.run import RunRequest
from loom.types import AgentNode, CapabilityProfile


def file_of(job: RunRequest) -> str:
    """Return the name of the file in the context of a job.

    Raises:
        AgentFailed: The context does not name a file.
    """
    file = job.context.get("file")
    if not isinstance(file, str) or not file:
        raise AgentFailed('name the input in the context of the task: {"file": "sales.csv"}')
    return file


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
    """Outline and review a Python source."""
    return code_review(file_of(job))


def quick_writing(job: RunRequest) -> str:
    """Name the keywords of a text."""
    return text_keywords(file_of(job))


def thorough_writing(job: RunRequest) -> str:
    """Summarize a text."""
    return text_summary(file_of(job))


def offline_nodes() -> list[AgentNode]:
    """Return two nodes per domain that need only the files."""
    functions_of = {"data": (quick_data, thorough_data), "code": (quick_code, thorough_code)}
    functions_of["writing"] = (quick_writing, thorough_writing)
    return [
        AgentNode(id=f"{domain}-{kind}", capabilities=CapabilityProfile(scores={domain: rating}), agent=function)
        for domain, functions in functions_of.items()
        for kind, rating, function in zip(("quick", "thorough"), (0.6, 0.85), functions, strict=True)
    ]


def model_nodes() -> list[AgentNode]:
    """Return one language model per domain, with that domain's functions as tools."""
    from loom import Agent, AgentConfig, OpenAIProvider  # noqa: PLC0415  - only with a model

    config = AgentConfig(model=os.environ.get("LOOM_MODEL") or AgentConfig.model, max_steps=5)
    provider = OpenAIProvider(config)
    tools = {
        "data": (table_overview, table_report),
        "code": (code_outline, code_review),
        "writing": (text_keywords, text_summary),
    }
    prompt = (
        "You answer tasks about one file. The context names it; read it with your tools before you answer. "
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
