"""Checks of the Runtime's arguments; each error has the correction."""

from typing import Any

from loom.agents.llm.config import AgentConfig
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import InvalidTask, LoomError

_EXAMPLE = "Runtime(OpenAIProvider(config), config)"


def check_provider(provider: Any) -> None:
    """Return if `provider` is a provider or None.

    Raises:
        LoomError: It is a setting, a class, or an object without `complete`.
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
    """Return if `config` is an AgentConfig or None.

    Raises:
        LoomError: It has another type.
    """
    if config is None or isinstance(config, AgentConfig):
        return
    if isinstance(config, ClusterConfig):
        raise LoomError("a ClusterConfig is not the config of agents: write Runtime(cluster_config=…)")
    raise LoomError(f"a {type(config).__name__} is not a config: write AgentConfig(model=…)")


def check_cluster_config(config: Any) -> None:
    """Return if `config` is a ClusterConfig or None.

    Raises:
        LoomError: It has another type.
    """
    if not isinstance(config, ClusterConfig | None):
        raise LoomError(f"cluster_config cannot be a {type(config).__name__}: write ClusterConfig(max_attempts=…)")


def check_several(ads: Any) -> None:
    """Return if `ads` is an iterable of tasks.

    Raises:
        InvalidTask: It is a string, a dict, or not iterable.
    """
    if isinstance(ads, str | dict) or not hasattr(ads, "__iter__"):
        raise InvalidTask(f"a {type(ads).__name__} is not a list of tasks: write submit_many([task, …])")
