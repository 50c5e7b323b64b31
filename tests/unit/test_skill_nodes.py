"""The node that a request creates from the known skills."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig
from loom.compat.skill_nodes import node_id, skill_nodes
from loom.compat.skill_registry import SkillNodeRegistry
from loom.schemas.auction import SpawnRequest
from loom.schemas.errors import LoomError
from loom.schemas.llm import CompletionParams, CompletionResult, StreamChunk
from loom.schemas.tokens import is_token
from loom.types import AgentNode, Skill, SkillTrigger


class Model:
    """Replies with the texts of its messages."""

    async def complete(self, params: CompletionParams) -> CompletionResult:
        return CompletionResult(content=" / ".join(str(message.content) for message in params.messages))

    async def stream(self, params: CompletionParams) -> AsyncIterator[StreamChunk]:
        yield StreamChunk(text=(await self.complete(params)).content, finish_reason="stop")


def search(text: str) -> str:
    """Search."""
    return text


def skill(name: str, *words: str, **facts: Any) -> Skill:
    return Skill(name=name, priority=1, trigger=SkillTrigger(keywords=list(words)), **facts)


def found(registry: SkillNodeRegistry, text: str, *tools: str) -> AgentNode | None:
    source = skill_nodes(registry, Model(), AgentConfig(system_prompt="You are one of many."))
    assert source is not None
    node = source(SpawnRequest(domain_token="data", description=text, required_tools=tools))
    assert node is None or isinstance(node, AgentNode)
    return node


def registry_of(*skills: Skill, **facts: Any) -> SkillNodeRegistry:
    registry = SkillNodeRegistry(**facts)
    registry.register_all(skills)
    return registry


def test_a_skill_the_text_calls_for_becomes_a_node_that_follows_its_instructions() -> None:
    registry = registry_of(skill("SQL", "sql", instructions="Use CTEs."))

    node = found(registry, "write some sql")

    assert node is not None
    assert (node.id, node.agent.name, registry.is_loaded("sql")) == ("skill-sql", "SQL", True)
    assert asyncio.run(node.agent.run("write some sql")).content == "Use CTEs. / write some sql"


def test_a_skill_without_a_matching_task_is_not_started() -> None:
    registry = registry_of(skill("sql", "sql"), Skill(name="by hand"))

    assert found(registry, "write a poem") is None
    assert not registry.is_loaded("sql")


def test_without_instructions_the_description_is_the_prompt_or_else_the_configs() -> None:
    registry = registry_of(skill("a", "sql", description="writes queries"), skill("b", "poem"))

    described, plain = found(registry, "sql"), found(registry, "poem")

    assert described is not None
    assert plain is not None
    assert (described.agent.system_prompt, plain.agent.system_prompt) == ("writes queries", "You are one of many.")


def test_a_skill_gets_its_named_tools_and_must_have_the_required_ones() -> None:
    best, able = skill("best", "sql"), skill("able", "sql", "query", tools=["search", "search"])
    registry = registry_of(best, able, tools=[search])

    node = found(registry, "sql", "search")

    assert node is not None
    assert isinstance(node.agent, Agent)
    assert (node.id, node.agent.tools) == ("skill-able", ("search",))
    assert node.to_bid(domain="data", required_tools=("search",)).tools == ("search",)
    assert found(registry, "sql", "search", "shell") is None
    assert not registry.is_loaded("best")


def test_a_skill_that_names_a_missing_tool_is_not_started() -> None:
    registry = registry_of(skill("sql", "sql", tools=["search"]))

    assert found(registry, "sql") is None
    assert not registry.is_loaded("sql")


def test_an_unusable_tool_is_refused_at_once_and_not_at_the_first_task() -> None:
    with pytest.raises(LoomError, match="cannot name a tool"):
        skill_nodes(registry_of(skill("sql", "sql"), tools=[lambda text: text]), Model())


def test_a_trigger_that_raises_matches_nothing() -> None:
    def broken(text: str) -> float:
        raise RuntimeError(text)

    assert found(registry_of(Skill(name="a", trigger=SkillTrigger(type="custom", evaluator=broken))), "sql") is None


def test_without_a_skill_or_a_model_nothing_is_made() -> None:
    assert skill_nodes(SkillNodeRegistry(), Model()) is None
    assert skill_nodes(registry_of(skill("a", "sql")), None) is None


@pytest.mark.parametrize("name", ["sql", "SQL", "sql expert", "代码", "x" * 58, "x" * 59, "x" * 300, ""])
def test_a_skills_node_has_an_id_that_fits_a_subject(name: str) -> None:
    assert is_token(node_id(Skill(name=name)))
    assert node_id(Skill(name=name)).startswith("skill-")
    assert node_id(Skill(name=name)) != node_id(Skill(name=f"{name}y"))
