"""Skill nodes of loom-agent 0.6: a skill becomes a node when a task needs it and no node can run the task."""

from collections.abc import Mapping
from functools import partial

from loom.agents.host.autoscaler import Skills
from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig
from loom.agents.llm.guarded_provider import GuardedProvider
from loom.agents.tools import Tool
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.compat.skill_choice import SkillChooser
from loom.compat.skill_registry import SkillNodeRegistry
from loom.nodes import AgentNode, CapabilityProfile
from loom.schemas.auction import SpawnRequest
from loom.schemas.errors import LoomError
from loom.schemas.llm import AnyProvider
from loom.schemas.tokens import domain_token
from loom.skills import Skill

log = get_logger()

LOADED_CLAIM = 0.7
"""Self-rating of the node of a loaded skill in the domain of the skill's name."""


def skill_nodes(
    registry: SkillNodeRegistry, provider: AnyProvider | None, config: AgentConfig | None = None
) -> Skills | None:
    """Return a factory of nodes of the registry's skills; None without a skill or a model.

    Raises:
        LoomError: One of the registry's tools cannot be described to a model.
    """
    if provider is None or not registry.size:
        return None
    return partial(
        _node_for, registry, SkillChooser(registry, GuardedProvider(provider)), tools_of(registry), provider, config
    )


def tools_of(registry: SkillNodeRegistry) -> dict[str, Tool]:
    """Return the tools of the registry, by name.

    Raises:
        LoomError: One of them cannot be described to a model.
    """
    made = (each if isinstance(each, Tool) else Tool(each) for each in registry.tools)
    return {tool.name: tool for tool in made}


def _node_for(
    registry: SkillNodeRegistry,
    chooser: SkillChooser,
    tools: Mapping[str, Tool],
    provider: AnyProvider,
    config: AgentConfig | None,
    wanted: SpawnRequest,
) -> AgentNode | None:
    """Return a node with the skill that fits the task best, marked as loaded; None if no skill fits."""
    try:
        skill = chooser.choose(wanted)
    except BaseException as error:  # noqa: BLE001 - an evaluator is user code: any exception is a mismatch
        log.warning("skill_trigger_raised", **error_fields(error))
        return None
    if skill is None:
        return None
    missing = sorted(set(skill.tools) - tools.keys())
    if missing:
        log.warning("skill_lacks_tools", skill=skill.name, tools=missing)
        return None
    registry.mark_loaded(skill.name)
    return node_of(skill, tools, provider, config)


def node_of(
    skill: Skill, tools: Mapping[str, Tool], provider: AnyProvider, config: AgentConfig | None = None
) -> AgentNode:
    """Return a node whose agent has the skill's instructions and those of `tools` that the skill names."""
    agent = Agent(
        provider,
        config,
        system_prompt=skill.instructions or skill.description or None,
        tools=[tools[name] for name in dict.fromkeys(skill.tools)],
        name=skill.name,
    )
    return AgentNode(id=node_id(skill), agent=agent)


def load(
    skill: Skill, registry: SkillNodeRegistry, provider: AnyProvider, config: AgentConfig | None = None
) -> AgentNode:
    """Register the skill as loaded, and return its node, with a self-rating in the domain of the skill's name.

    Raises:
        LoomError: The skill names a tool that the registry was not given.
    """
    tools = tools_of(registry)
    missing = ", ".join(sorted(set(skill.tools) - tools.keys()))
    if missing:
        raise LoomError(f"skill {skill.name} needs tools that are not in the skill_registry: {missing}")
    node = node_of(skill, tools, provider, config)
    node.capabilities = CapabilityProfile(scores={skill.name: LOADED_CLAIM}, tools=list(skill.tools))
    registry.register(skill)
    registry.mark_loaded(skill.name)
    return node


def node_id(skill: Skill) -> str:
    """Return the id of a skill's node, always the same, so that its evidence outlives the node."""
    name = domain_token(f"skill-{skill.name}")
    return name if name.startswith("skill-") else f"skill-{name}"
