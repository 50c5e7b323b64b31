"""Skills become nodes: where nobody can take a task that calls for one, an agent is made of it."""

from collections.abc import Mapping
from functools import partial

from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig
from loom.agents.nursery import Skills
from loom.agents.tools import Tool
from loom.bus.faults import describe
from loom.bus.log import get_logger
from loom.cluster.skill_registry import SkillNodeRegistry
from loom.schemas.auction import SpawnRequest
from loom.schemas.llm import AnyProvider
from loom.schemas.task import slug
from loom.types import AgentNode, Skill

log = get_logger()


def skill_nodes(
    registry: SkillNodeRegistry, provider: AnyProvider | None, config: AgentConfig | None = None
) -> Skills | None:
    """Return what makes nodes of the registry's skills on request; None without a skill, or a model to work with.

    Raises:
        LoomError: One of the registry's tools cannot be described to a model.
    """
    if provider is None or not registry.size:
        return None
    made = (each if isinstance(each, Tool) else Tool(each) for each in registry.tools)
    return partial(_node_for, registry, {tool.name: tool for tool in made}, provider, config)


def _node_for(
    registry: SkillNodeRegistry,
    tools: Mapping[str, Tool],
    provider: AnyProvider,
    config: AgentConfig | None,
    wanted: SpawnRequest,
) -> AgentNode | None:
    """Return a node with the skill the task calls for most, marked as loaded; None where none will do."""
    try:
        skill = registry.find_match(wanted.description, required_tools=wanted.required_tools)
    except BaseException as error:  # noqa: BLE001 - a trigger's evaluator is user code: whatever it raises is no match
        log.warning("skill_trigger_raised", **describe(error))
        return None
    if skill is None:
        return None
    missing = sorted(set(skill.tools) - tools.keys())
    if missing:
        log.warning("skill_lacks_tools", skill=skill.name, tools=missing)
        return None
    agent = Agent(
        provider,
        config,
        system_prompt=skill.instructions or skill.description or None,
        tools=[tools[name] for name in dict.fromkeys(skill.tools)],
        name=skill.name,
    )
    registry.mark_loaded(skill.name)
    return AgentNode(id=node_id(skill), agent=agent)


def node_id(skill: Skill) -> str:
    """Return the id of a skill's node, always the same: evidence about it outlives it."""
    name = slug(f"skill-{skill.name}")
    return name if name.startswith("skill-") else f"skill-{name}"
