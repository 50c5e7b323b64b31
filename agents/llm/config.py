"""The settings of an agent and of the model it uses."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loom.agents.llm.checks import header_fault, key_fault, url_fault
from loom.schemas.base import free_json_fault
from loom.schemas.checks.constructor_errors import fields_by_name

PROVIDERS = ("openai",)
GREATEST_TEMPERATURE = 2.0
RESERVED = frozenset({"messages", "tools", "stream"})
"""Fields of a request that `extra` cannot set."""


@fields_by_name
@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Settings of an agent and of its model; the repr does not show the API key and the headers.

    A setting of None is left out of the request, so that the default of the server applies.

        AgentConfig(model="gpt-5-mini", temperature=None, reasoning_effort="low", extra={"top_p": 0.9})
        AgentConfig(model="my-deployment", base_url="https://me.openai.azure.com", api_version="2024-10-21")

    Raises:
        ValueError: A setting is out of range or cannot be sent; the message names it.
    """

    provider: str = "openai"
    """The protocol: `openai`, for any compatible server. For another protocol, pass an object with `complete` and
    `stream` instead of `OpenAIProvider`."""
    model: str = "gpt-4o-mini"
    """The name of the model; with Azure, the name of the deployment."""
    system_prompt: str = ""
    max_steps: int = 10
    """Maximum number of rounds with the model for one job."""
    temperature: float | None = 0.7
    """0 to 2."""
    max_tokens: int | None = 4096
    """Maximum tokens of one answer, including reasoning. Sent as `max_completion_tokens` to models that require it."""
    token_budget: int = 128_000
    """Maximum size of a conversation in tokens."""
    stream: bool = True
    reasoning_effort: str | None = None
    """`low`, `medium`, `high` or another value of the model."""
    tool_choice: str | dict[str, Any] | None = None
    """Sent with each request that has tools."""
    extra: dict[str, Any] = field(default_factory=dict, repr=False)
    """Fields merged into the body of each request, such as `{"top_p": 0.9}`; they override the other settings. A value
    of None removes a field. Same as `extra_body` of the openai library."""
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    """Sent with each request."""
    api_key: str | None = field(default=None, repr=False)
    """Default: `OPENAI_API_KEY`, or `AZURE_OPENAI_API_KEY` with `api_version`. White space around it is removed."""
    base_url: str | None = None
    """Default: `OPENAI_BASE_URL`, else that of OpenAI; `AZURE_OPENAI_ENDPOINT` with `api_version`. A query in it is
    sent with each request."""
    api_version: str | None = None
    """Selects Azure: sent as `api-version`, with the key in the header `api-key`."""
    timeout_s: float = 60.0
    """Seconds without data from the server after which a try fails."""
    connect_timeout_s: float = 10.0
    tool_context: dict[str, Any] = field(default_factory=dict, repr=False)
    """Passed to tools in their ToolContext."""

    def __post_init__(self) -> None:
        if isinstance(self.api_key, str):
            object.__setattr__(self, "api_key", self.api_key.strip() or None)
        for name, (holds, rule) in _RULES.items():
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"{name} {rule}" + ("" if name in _UNSHOWN else f", not {value!r}"))
        faults = {
            "provider": None if self.provider in PROVIDERS else _OTHER_PROVIDER,
            "api_key": None if self.api_key is None else key_fault(self.api_key),
            "base_url": None if self.base_url is None else url_fault(self.base_url),
            **{f"headers[{name!r}]": header_fault(name, value) for name, value in self.headers.items()},
        }
        for name, fault in faults.items():
            if fault:
                raise ValueError(f"{name} {fault}")


OF_PROVIDERS = (
    "provider",
    "model",
    "reasoning_effort",
    "tool_choice",
    "extra",
    "headers",
    "api_key",
    "base_url",
    "api_version",
    "timeout_s",
    "connect_timeout_s",
)
"""Settings that only providers read."""


def settings_without_effect(config: AgentConfig, provider: Any) -> list[str]:
    """Return the names of settings in an agent's config that its provider does not use.

    The list is empty if the provider's `config` is not an AgentConfig, because its settings are then unknown.
    """
    own, default = getattr(provider, "config", None), AgentConfig()
    if not isinstance(own, AgentConfig):
        return []
    return [
        name
        for name in OF_PROVIDERS
        if getattr(config, name) != getattr(default, name) and getattr(config, name) != getattr(own, name)
    ]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_temperature(value: Any) -> bool:
    return value is None or (_is_number(value) and 0 <= value <= GREATEST_TEMPERATURE)


def _is_optional_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_json(value: Any) -> bool:
    return free_json_fault(value, max_bytes=sys.maxsize) is None


def _has_text_keys(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


_COUNT = (_is_count, "must be a whole number and at least 1")
_SECONDS = (lambda value: _is_number(value) and value > 0, "must be a number of seconds above 0")
_OPTIONAL_TEXT = (_is_optional_text, "must be a text or None")
_OTHER_PROVIDER = (
    f"is unknown; known: {', '.join(PROVIDERS)}, for any server with OpenAI's chat completions API (see base_url). "
    "For another API pass an object with `complete` and `stream` instead of OpenAIProvider"
)
_UNSHOWN = frozenset({"system_prompt", "extra", "headers"})
"""Settings whose values do not appear in messages."""
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "provider": (lambda value: isinstance(value, str), "must be a text"),
    "model": (lambda value: isinstance(value, str) and value.strip() != "", "must be the name of a model"),
    "system_prompt": (lambda value: isinstance(value, str), "must be a text"),
    "max_steps": _COUNT,
    "temperature": (_is_temperature, f"must be None or a number from 0 to {GREATEST_TEMPERATURE:g}"),
    "max_tokens": (lambda value: value is None or _is_count(value), f"{_COUNT[1]}, or None"),
    "token_budget": _COUNT,
    "reasoning_effort": _OPTIONAL_TEXT,
    "tool_choice": (
        lambda value: isinstance(value, str | dict | None) and _is_json(value),
        "must be a text, a JSON object or None",
    ),
    "extra": (
        lambda value: _has_text_keys(value) and not RESERVED & value.keys() and _is_json(value),
        f"must be JSON: a dict of a request's fields, without {', '.join(sorted(RESERVED))}: the agent sets those",
    ),
    "headers": (_has_text_keys, "must be a dict of texts"),
    "api_version": _OPTIONAL_TEXT,
    "timeout_s": _SECONDS,
    "connect_timeout_s": _SECONDS,
}
