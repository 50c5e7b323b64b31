"""What the front door is given in the wrong place: one sentence on what to write instead."""

from typing import Any

from loom.agents.llm.config import AgentConfig
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import InvalidTask, LoomError

_EXAMPLE = "Runtime(OpenAIProvider(config), config)"


def check_provider(provider: Any) -> None:
    """Raise LoomError if what is given as a provider is not one; None is fine.

    Raises:
        LoomError: It is a setting, a class, or has no `complete`.
    """
    if provider is None:
        return
    if isinstance(provider, AgentConfig):
        raise LoomError(f"an AgentConfig is not a provider, which comes first: write {_EXAMPLE}")
    if isinstance(provider, ClusterConfig):
        raise LoomError("a ClusterConfig is not a provider: write Runtime(cluster_config=…)")
    if isinstance(provider, type):
        raise LoomError(
            f"the class {provider.__name__} is not a provider: give an object of it, {provider.__name__}(…)"
        )
    if not callable(getattr(provider, "complete", None)):
        hint = f"write {_EXAMPLE} with config = AgentConfig(model=…), or give an object with `complete` and `stream`"
        raise LoomError(f"a {type(provider).__name__} is not a provider: {hint}")


def check_config(config: Any) -> None:
    """Raise LoomError if what is given as an agent's settings is something else; None is fine.

    Raises:
        LoomError: It is not an AgentConfig.
    """
    if config is None or isinstance(config, AgentConfig):
        return
    if isinstance(config, ClusterConfig):
        raise LoomError("a ClusterConfig is not the config of agents: write Runtime(cluster_config=…)")
    raise LoomError(f"a {type(config).__name__} is not a config: write AgentConfig(model=…)")


def check_cluster_config(config: Any) -> None:
    """Raise LoomError if what is given as the phases' settings is something else; None is fine.

    Raises:
        LoomError: It is not a ClusterConfig.
    """
    if not isinstance(config, ClusterConfig | None):
        raise LoomError(f"cluster_config cannot be a {type(config).__name__}: write ClusterConfig(max_attempts=…)")


def check_several(ads: Any) -> None:
    """Raise InvalidTask if what is given as several tasks is a single one.

    Raises:
        InvalidTask: It is a text, a dict, or cannot be iterated over.
    """
    if isinstance(ads, str | dict) or not hasattr(ads, "__iter__"):
        raise InvalidTask(f"a {type(ads).__name__} is not a list of tasks: write submit_many([task, …])")
