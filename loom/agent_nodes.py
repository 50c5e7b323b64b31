"""Agents of the nodes that `Runtime.add_agent` adds: made of a provider, or given."""

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from loom.agents.function_agent import as_agent
from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig, settings_without_effect
from loom.agents.tools import Tool
from loom.arguments import check_config, check_provider
from loom.bus.logs.logger import get_logger
from loom.nodes import AgentNode, CapabilityProfile
from loom.schemas.errors import LoomError
from loom.schemas.llm import AnyProvider

log = get_logger()


def made_agent(
    provider: AnyProvider | None,
    config: AgentConfig,
    *,
    system_prompt: str | None,
    tools: Iterable[Tool | Callable[..., Any]],
) -> Agent:
    """Return an agent of a model.

    Args:
        provider: The model.
        config: Settings of the agent. Those that only a provider reads are logged if the provider has others.
        system_prompt: Used instead of the config's.
        tools: Tools, functions to make tools of, or a ToolRegistry.

    Raises:
        LoomError: There is not a provider, or an argument is of another type.
    """
    check_provider(provider)
    check_config(config)
    if provider is None:
        raise LoomError("no provider: pass one to Runtime or add_agent, or an agent or function to add_agent")
    unused = settings_without_effect(config, provider)
    if unused:
        log.warning("settings_without_effect", settings=unused, advice="pass provider=OpenAIProvider(config)")
    return Agent(provider, config, system_prompt=system_prompt, tools=tools)


def check_agent(agent: Any, *, provider: Any, config: Any, **made_of: Any) -> None:
    """Return if `agent` can do the work of a node, and no argument is for another one.

    Args:
        agent: A function, or an object with `stream` or `run`.
        provider: Must be None.
        config: Must be None.
        made_of: Further arguments that an agent has already; each must be None.

    Raises:
        LoomError: It is not an agent, or one of the arguments is given.
    """
    check_provider(provider)
    check_config(config)
    made_of |= {"provider": provider, "config": config}
    given = [name for name, value in made_of.items() if value is not None]
    if given:
        raise LoomError(f"leave out the agent or {', '.join(given)}: only an agent that add_agent makes has that")
    if isinstance(agent, AgentNode):
        raise LoomError("an AgentNode is a node already: add it by rt.cluster.add_node(node)")
    as_agent(agent)  # refused here and not in every run


def derived_name(agent: Any, capabilities: CapabilityProfile, taken: Sequence[str]) -> str:
    """Return the node id of an agent without a name: a digest of its parts, so it is the same after a restart.

    Args:
        agent: The agent; its system prompt or its qualified name is part of the digest.
        capabilities: Its ratings and tools are part of the digest.
        taken: Node ids of the Runtime; the number of equal digests is added.
    """
    parts = [
        getattr(agent, "system_prompt", "") or getattr(agent, "__qualname__", type(agent).__name__),
        sorted(capabilities.tools),
        sorted(capabilities.scores.items()),
    ]
    digest = blake2b(msgspec.json.encode(parts), digest_size=4).hexdigest()
    return f"{digest}-{sum(name.startswith(digest) for name in taken) + 1}"
